"""A bounded run of the fuzzers, the same every time; docs/verifying.md says how to run them for longer."""

from __future__ import annotations

import json
import sys

import pytest

from .tools import ROOT, run_checked

PROGRAM = ROOT / "tests/fuzz/run.py"
TARGETS = ("header", "index", "recipe", "measurement", "record")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_breaks_a_reader(target):
    output = run_checked([sys.executable, PROGRAM, target], METAGPT_FAST_THREADS="1")
    result = json.loads(output)[target]
    assert result["finding"] is None
    assert result["executions"] >= 300
    assert 0 < result["accepted"] < result["executions"] / 2, "mutations are too wild, or change nothing"


def test_what_a_reader_must_not_do_is_a_finding(tmp_path):
    """The guard itself, in a process of its own: an audit hook stays."""
    code = f"""
import os, pickle, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.fuzz.targets import Finding, guarded
folder = Path({str(tmp_path)!r}) / "inside"
folder.mkdir()
(folder / "sound").write_text("")
def ends(act):
    try:
        call(lambda content: act(), b"")
    except BaseException as error:
        return type(error).__name__
with guarded(folder) as call:
    print(ends(lambda: (folder / "file").write_text("x")), ends(lambda: (folder / "sound").read_text()))
    print(ends(lambda: (folder.parent / "file").write_text("x")), ends(lambda: (folder / ".." / "f").touch()))
    print(ends(lambda: os.system("true")), ends(lambda: eval("1 + 1")), ends(lambda: pickle.loads(pickle.dumps(Path))))
    print(ends(lambda: bytearray(1 << 30)), ends(lambda: os.rename(folder / "file", folder.parent / "x")))
"""
    lines = run_checked([sys.executable, "-c", code]).splitlines()
    assert lines == ["None None", "Finding Finding", "Finding Finding Finding", "MemoryError Finding"]
