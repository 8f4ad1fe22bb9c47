"""Memory is bounded by --memory, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from metagpt_fast.family import LlamaShape, make_family

# Samples this process's resident memory while a merge runs in it.
SCRIPT = """
import json, sys, threading
import metagpt_fast as mf

peak = {"RssAnon": 0, "VmRSS": 0}
done = threading.Event()

def sample():
    while not done.wait(0.002):
        for line in open("/proc/self/status"):
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]) * 1024)

thread = threading.Thread(target=sample)
thread.start()
base, *models, out = sys.argv[1:]
mf.merge(base, models, out, memory="96MiB")
done.set()
thread.join()
print(json.dumps(peak))
"""


@pytest.mark.parametrize("num_layers", [2, 8])
def test_memory_does_not_grow_with_the_model(num_layers, tmp_path):
    shape = LlamaShape(
        hidden_size=1024, intermediate_size=4096, num_layers=num_layers, num_heads=8, num_kv_heads=8, vocab_size=8000,
        tie_word_embeddings=True,
    )  # fmt: skip
    family = make_family(tmp_path, shape=shape, max_shard_nbytes=200_000_000, seed=1)
    command = [sys.executable, "-c", SCRIPT, str(family.base), *map(str, family.models), str(tmp_path / "out")]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak["RssAnon"] < 300e6
    assert peak["VmRSS"] < 96 * 2**20 + 300e6
