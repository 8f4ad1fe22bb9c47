"""Options of bench_kernels and bench_io, and the path to what the benchmarks share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put kernels in the order of their turns, whatever a plugin has made of it."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[object, ...]:
    call = getattr(item, "callspec", None)
    return tuple(call.params.values()) if call is not None and "turn" in call.params else ()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; ``pytest bench/bench_kernels.py --help`` shows them."""
    group = parser.getgroup("kernels", "kernel benchmarks")
    group.addoption("--grid", action="store_true", help="every dtype, T and ISA, not only bf16, T = 3, the best ISA")
    group.addoption("--numel", type=int, help="elements per array [64 Mi, less where memory is short]")
    group.addoption("--turns", type=int, default=4, help="how often every case has its turn [4]")
    group.addoption("--rounds", type=int, default=7, help="rounds of kernel and ceiling each time [7]")
    group.addoption("--baseline-rounds", type=int, default=3, help="rounds of NumPy and torch, 0: none [3]")
    group.addoption("--rows", type=Path, metavar="FILE", help="write the rows as JSON, for run.py")
    group = parser.getgroup("io", "benchmarks of files")
    group.addoption("--io-folder", type=Path, metavar="DIR", help="where the files are made [the temporary folder]")
    group.addoption("--io-size", default="1GB", help="bytes of all of them; 1.3 times as much is needed free [1GB]")
    group.addoption("--io-rounds", type=int, default=5, help="rounds of each way and its ceiling [5]")
