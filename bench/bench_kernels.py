"""The kernels in memory, against the machine's own bandwidth, NumPy and torch.

    pytest bench/bench_kernels.py              bf16, T = 3, the best ISA, one thread and all
    pytest bench/bench_kernels.py --grid       each dtype, T = 1, 3, 8, each ISA

Each round of a kernel follows one of its ceiling, by the same threads on the same memory: reading base and models, or
a triad on base, one model and the output. Percent of the ceiling is the median of the rounds' ratios, because on a
shared machine both move together. A triad writes a third of its bytes and layer_merge with T models 1/(2+T) of them;
the read that the processor does before it overwrites a cache line is in neither formula, so a merge can pass 100 %.

A shared machine's speed changes within minutes, more than within the second that a kernel's rounds take. So every case
has several turns, all the others in between, and its spread is that of the rounds of all turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from baselines import numpy_gram, numpy_merge, torch_gram, torch_merge, torch_tensors
from benchlib.machine import available_memory_nbytes
from benchlib.processes import clean_environment
from benchlib.rows import Row, Spread, gram_nbytes, merge_nbytes, save_rows
from numpy.typing import NDArray

from metagpt_fast import _native
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.benchmarking.arrays import DEFAULT_NUMEL, DTYPES, LayerArrays, make_layer_arrays
from metagpt_fast.reference import to_float64

_FORMULAS = {
    "layer_gram": ("(1+T)·n·itemsize", gram_nbytes),
    "layer_merge": ("(2+T)·n·itemsize", merge_nbytes),
}
_CEILINGS = {"layer_gram": "read", "layer_merge": "triad"}
_DEFAULT_NUM_MODELS = 3
_SAMPLE_NUMEL = 1 << 16
_MATRIX_SIZE = 3072
# In a process of its own, because a BLAS takes its number of threads from the environment when it is loaded.
_MATRIX_PRODUCTS = f"""
import json, time
import numpy as np
a = np.random.default_rng(0).standard_normal(({_MATRIX_SIZE}, {_MATRIX_SIZE}), np.float32)
out, seconds = a @ a, []
for _ in range(11):
    started = time.perf_counter()
    np.matmul(a, a, out=out)
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""


@dataclass
class Case:
    """What is known of a kernel's row, and the seconds of kernel and ceiling of every round so far."""

    facts: dict[str, Any]
    formula: str
    nbytes: int
    ceiling_nbytes: int
    baselines: dict[str, float]
    rounds: list[tuple[float, float]] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """Return what all turns have found."""
        seconds = [own for own, _ in self.rounds]
        rates = [self.nbytes / s / 1e9 for s in seconds]
        ceilings = [self.ceiling_nbytes / s / 1e9 for _, s in self.rounds]
        metrics = {
            "seconds": Spread.of(seconds),
            "gb_per_s": Spread.of(rates),
            "ceiling_gb_per_s": Spread.of(ceilings),
            "percent_of_ceiling": Spread.of([100 * r / c for r, c in zip(rates, ceilings, strict=True)]),
        }
        for peer, baseline_seconds in self.baselines.items():
            metrics[f"speedup_{peer}"] = Spread.of([baseline_seconds / s for s in seconds])
        return Row("kernels", name, self.facts, metrics, formula=self.formula, nbytes=self.nbytes)


_ceilings: list[Row] = []
_cases: dict[str, Case] = {}
# Baselines know no ISA: one measurement serves all of them. By kernel, dtype, T, threads.
_baseline_seconds: dict[tuple[str, str, int, int], dict[str, float]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the cases; sorted so that neighbours share their arrays."""
    if "kernel" not in metafunc.fixturenames:
        return
    is_grid = metafunc.config.getoption("grid")
    isas = _native.supported_isas()
    num_threads = _thread_counts()
    cases = [
        (turn, dtype, num_models, kernel, isa, threads)
        for turn in range(metafunc.config.getoption("turns"))
        for dtype in (DTYPES if is_grid else ["bf16"])
        for num_models in ((1, 3, 8) if is_grid else [_DEFAULT_NUM_MODELS])
        for kernel in _FORMULAS
        for isa in (isas if is_grid else isas[-1:])
        for threads in num_threads
    ]
    ids = [f"{kernel}-{dtype}-T{t}-{isa}-{threads}-{turn}" for turn, dtype, t, kernel, isa, threads in cases]
    metafunc.parametrize(("turn", "dtype", "num_models", "kernel", "isa", "threads"), cases, ids=ids)


def _thread_counts() -> list[int]:
    return sorted({1, len(os.sched_getaffinity(0))})


@pytest.fixture(scope="module")
def arrays() -> Iterator[Callable[..., LayerArrays]]:
    """Make a layer's arrays, and keep only the latest: they take gigabytes."""
    latest: dict[tuple[str, int], LayerArrays] = {}
    numels: dict[tuple[str, int], int] = {}  # the same in every turn, however much memory there is then

    def make(dtype: str, num_models: int, numel: int | None) -> LayerArrays:
        key = (dtype, num_models)
        if key not in latest:
            latest.clear()
            operand_nbytes = (2 + num_models) * DTYPES[dtype].itemsize
            fitting = numel or min(DEFAULT_NUMEL, available_memory_nbytes() // 2 // operand_nbytes)
            latest[key] = make_layer_arrays(DTYPES[dtype], num_models, numels.setdefault(key, fitting))
        return latest[key]

    yield make
    latest.clear()


@pytest.fixture(scope="module", autouse=True)
def _save_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if path := request.config.getoption("rows"):
        save_rows([*_ceilings, *(case.row(name) for name, case in _cases.items())], path)


@pytest.fixture
def _kernel_settings(isa: str, threads: int) -> Iterator[None]:
    _native.set_isa(isa)
    _native.set_num_threads(threads)
    yield
    _native.set_isa("auto")
    _native.set_num_threads(0)


def test_compute_ceiling() -> None:
    """Measure how much arithmetic the cores do: for the roofline, not for the kernels' percent."""
    for threads in _thread_counts():
        environment = {
            **clean_environment(),
            **{f"{library}_NUM_THREADS": str(threads) for library in ("OPENBLAS", "MKL")},
        }
        command = [sys.executable, "-c", _MATRIX_PRODUCTS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds = json.loads(done.stdout)
        note = "NumPy's float32 matrix product, 3072 x 3072: what a good kernel gets from these cores"
        facts = {"ceiling": "compute", "threads": threads}
        metrics = {"gflop_per_s": Spread.of([2 * _MATRIX_SIZE**3 / s / 1e9 for s in seconds])}
        _ceilings.append(Row("ceilings", f"compute threads={threads}", facts, metrics, notes=(note,)))


@pytest.mark.usefixtures("_kernel_settings")
def test_kernel(
    benchmark: Any,
    arrays: Callable[..., LayerArrays],
    request: pytest.FixtureRequest,
    turn: int,
    dtype: str,
    num_models: int,
    kernel: str,
    isa: str,
    threads: int,
) -> None:
    layer = arrays(dtype, num_models, request.config.getoption("numel"))
    formula, nbytes_of = _FORMULAS[kernel]
    nbytes = nbytes_of(layer.numel, layer.dtype.itemsize, num_models)
    run = _kernel_call(kernel, layer)
    measure_ceiling, ceiling_nbytes = _ceiling_call(kernel, layer)
    ceiling_seconds: list[float] = []

    def setup() -> None:
        started = time.perf_counter()
        measure_ceiling()
        ceiling_seconds.append(time.perf_counter() - started)

    benchmark.pedantic(run, setup=setup, rounds=request.config.getoption("rounds"), warmup_rounds=2)
    seconds = benchmark.stats.stats.data
    name = f"{kernel} {dtype} T={num_models} {isa} threads={threads}"
    if name not in _cases:
        facts = {"kernel": kernel, "dtype": dtype, "num_models": num_models, "isa": isa, "threads": threads}
        facts |= {"numel": layer.numel, "ceiling": _CEILINGS[kernel]}
        baselines = _baselines(kernel, dtype, layer, threads, request.config.getoption("baseline_rounds"))
        _cases[name] = Case(facts, formula, nbytes, ceiling_nbytes, baselines)
    # The ceilings of the warm-up rounds come first.
    _cases[name].rounds += zip(seconds, ceiling_seconds[-len(seconds) :], strict=True)


def _kernel_call(kernel: str, layer: LayerArrays) -> Callable[[], object]:
    backend = CpuBackend()
    if kernel == "layer_gram":
        return lambda: backend.layer_gram(layer.table, layer.gram)
    return lambda: backend.layer_merge(layer.table, layer.coefficients, layer.out_table)


def _ceiling_call(kernel: str, layer: LayerArrays) -> tuple[Callable[[], object], int]:
    """Return the ceiling on the layer's own memory, and the bytes that it moves."""
    if kernel == "layer_gram":
        nbytes = gram_nbytes(layer.numel, layer.dtype.itemsize, layer.num_models)
        address = layer.memory.ctypes.data
        return lambda: _native.bandwidth_read(address, nbytes), nbytes
    base, model, out = (layer.arrays[i].ctypes.data for i in (0, 1, -1))
    numel = layer.numel * layer.dtype.itemsize // 4
    return lambda: _native.bandwidth_triad(out, base, model, numel), 3 * 4 * numel


def _baselines(kernel: str, dtype: str, layer: LayerArrays, threads: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of NumPy and, if it is installed, of torch, after checking what they compute."""
    key = (kernel, dtype, layer.num_models, threads)
    if key not in _baseline_seconds and rounds > 0:
        layer.gram[:] = 0
        _kernel_call(kernel, layer)()
        wanted = _answer(kernel, layer, layer.gram)
        _baseline_seconds[key] = {}
        for name, call in _baseline_calls(kernel, layer, threads).items():
            seconds = []
            for _ in range(rounds):
                started = time.perf_counter()
                returned = call()
                seconds.append(time.perf_counter() - started)
            np.testing.assert_allclose(_answer(kernel, layer, returned), wanted, rtol=0.01, atol=1e-6)
            _baseline_seconds[key][name] = statistics.median(seconds)
    return _baseline_seconds.get(key, {})


def _baseline_calls(kernel: str, layer: LayerArrays, threads: int) -> dict[str, Callable[[], Any]]:
    numpy_call = numpy_gram if kernel == "layer_gram" else numpy_merge
    calls: dict[str, Callable[[], Any]] = {"numpy": lambda: numpy_call(layer)}
    if find_spec("torch") is not None:
        tensors, coefficients = torch_tensors(layer), layer.coefficients[0].tolist()
        if kernel == "layer_gram":
            calls["torch"] = lambda: torch_gram(tensors[:-1], threads)
        else:
            calls["torch"] = lambda: torch_merge(tensors, coefficients, threads)
    return calls


def _answer(kernel: str, layer: LayerArrays, returned: Any) -> NDArray[np.float64]:
    """Return the result to compare: the Gram matrix, or the output's first elements."""
    if kernel == "layer_gram":
        return np.array(returned, np.float64).reshape(layer.gram.shape)
    return to_float64(layer.arrays[-1][: _SAMPLE_NUMEL * layer.dtype.itemsize], layer.dtype)
