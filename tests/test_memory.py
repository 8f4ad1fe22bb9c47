"""Memory is bounded by --memory and 300 MB, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metagpt_fast.dtypes import BF16
from metagpt_fast.family import LlamaShape, family_nbytes, make_family

MEMORY_NBYTES = 128 << 20
ANONYMOUS_NBYTES = 300_000_000
NOISE_NBYTES = 16 << 20
WAYS = ("model, mmap", "layer, mmap", "model, pread")

# Samples this process's resident memory while merges run in it.
SCRIPT = """
import json, sys, threading
import metagpt_fast as mf

def status():
    lines = open("/proc/self/status").read().splitlines()
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
            if name in ("RssAnon", "RssFile", "VmRSS")}

def sample():
    while not done.wait(0.001):
        for name, nbytes in status().items():
            peak[name] = max(peak[name], nbytes)

base, *models, out = sys.argv[1:]
peaks = {}
for granularity, io in (("model", "mmap"), ("layer", "mmap"), ("model", "pread")):
    peak, done = status(), threading.Event()
    thread = threading.Thread(target=sample)
    thread.start()
    mf.merge(base, models, f"{out}-{len(peaks)}", memory="128MiB", granularity=granularity, io=io)
    done.set()
    thread.join()
    peaks[f"{granularity}, {io}"] = peak
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Peaks of the merges of a family, and of one with four times as many layers and larger tensors."""
    found = []
    for num_layers in (1, 4):
        folder: Path = tmp_path_factory.mktemp("family")
        shape = LlamaShape(
            hidden_size=1024 + 128 * num_layers,
            intermediate_size=6144,
            num_layers=num_layers,
            num_heads=8,
            num_kv_heads=8,
            vocab_size=8000,
            tie_word_embeddings=True,
        )
        nbytes = family_nbytes(shape, 3, BF16)
        assert nbytes > MEMORY_NBYTES
        family = make_family(folder, shape=shape, max_shard_nbytes=100_000_000, seed=1)
        command = [sys.executable, "-c", SCRIPT, str(family.base), *map(str, family.models), str(folder / "out")]
        finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        found.append((nbytes, json.loads(finished.stdout)))
        for path in folder.rglob("*.safetensors"):
            path.unlink()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_bounded(peaks, way):
    for nbytes, by_way in peaks:
        peak = by_way[way]
        assert peak["RssAnon"] < ANONYMOUS_NBYTES, (nbytes, peak)
        assert peak["VmRSS"] < MEMORY_NBYTES + ANONYMOUS_NBYTES, (nbytes, peak)
        # Of the window's three batches; the interpreter's own libraries are mapped files, too.
        assert peak["RssFile"] < MEMORY_NBYTES + 64 * 2**20, (nbytes, peak)


@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_model(peaks, way):
    (small_nbytes, small), (large_nbytes, large) = peaks
    assert large_nbytes > 2.5 * small_nbytes
    assert large[way]["RssAnon"] < small[way]["RssAnon"] + NOISE_NBYTES
    assert large[way]["VmRSS"] < MEMORY_NBYTES + small[way]["RssAnon"] + 64 * 2**20 + NOISE_NBYTES
