"""bench_mergekit_fast: what it makes of two commands; on a program that stands in for both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metagpt_fast.family import PRESETS, make_family

from .tools import ROOT

sys.path.append(str(ROOT / "bench"))  # behind everything else: its names are plain

import bench_mergekit_fast
from benchlib.mergekit_table import mergekit_table
from benchlib.processes import ProcessError
from make_family import BenchFamily

# Ours takes no time and mergekit's a little; both write what mergekit_phases.py writes.
PROGRAM = """
import json, sys, time
whose, phases, recipe, out, *options = sys.argv[1:]
assert "merge_method" in open(recipe).read() and "--no-copy-tokenizer" in options
assert ("--async-write" in options) == (whose == "theirs")
if "ties" in recipe:
    sys.exit("no ties today")
time.sleep(0.3 if whose == "theirs" else 0)
with open(phases, "a") as file:
    print(json.dumps({"seconds": 8.0 if whose == "theirs" else 2.0, "anonymous_nbytes": 0}), file=file)
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    preset = PRESETS["tiny"]
    made = make_family(tmp_path / "family", shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=5)
    family = BenchFamily(made.base, made.models, made.num_parameters)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(bench_mergekit_fast.mergekit_phases, "__file__", str(program))
    scratch = Path(tmp_path / "scratch")
    scratch.mkdir()
    return lambda method, rounds: bench_mergekit_fast.measure(
        method, family, scratch, rounds, "bfloat16", lambda line: None
    )


def test_rows_and_speedups(measure):
    ours, theirs = measure("linear", 3)
    assert [row.name for row in (ours, theirs)] == ["mergekit-yaml-fast: linear", "mergekit, fast options: linear"]
    assert ours.metrics["seconds"].n == 3
    assert theirs.metrics["seconds"].n == 2
    assert ours.metrics["speedup_mergekit_fast"].n == 3
    assert ours.metrics["speedup_mergekit_fast"].median > 1
    assert ours.metrics["speedup_after_planning"].median == 4.0
    assert ours.metrics["peak_above_imports_mb"].median > 0
    assert "speedup_after_planning" not in theirs.metrics
    table = mergekit_table([theirs, ours])
    assert table.splitlines()[-1].startswith("| `linear` | ")
    assert " 4.00 (4.00..4.00) " in table
    assert mergekit_table([]) == ""


def test_a_command_that_fails(measure):
    with pytest.raises(ProcessError, match="no ties today"):
        measure("ties", 1)
