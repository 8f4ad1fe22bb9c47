"""Runs the Triton kernels in Triton's interpreter, on the CPU.

In a process of its own: kernels are interpreted from import on or not at all, and other tests compile them.
"""

from __future__ import annotations

import pytest

from .tools import ROOT, run_checked, tool

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ["dense", "sparse", "memory"])
def test_kernels_in_the_interpreter(part):
    file = ROOT / "tests" / f"interpreted_{part}.py"
    run_checked([tool("pytest"), "-q", "-p", "no:cacheprovider", file], 600, TRITON_INTERPRET="1")
