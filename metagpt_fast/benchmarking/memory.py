"""Measures memory and kernels: in turns, on the same arrays, by the kernels' threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from .. import _native
from ..backends.cpu import CpuBackend
from ..dtypes import BF16
from .arrays import DEFAULT_NUMEL, LayerArrays, make_layer_arrays
from .work import NUM_MODELS

_NUM_ROUNDS = 7
_NUM_OPERANDS = NUM_MODELS + 2  # base, models, output


@dataclass(frozen=True, slots=True)
class MemoryRates:
    """Bytes per second, as in :class:`~metagpt_fast.benchmarking.rates.Rates`: medians."""

    memory_read: float
    memory_triad: float
    layer_gram: float
    layer_merge: float


def numel_for(available_nbytes: int) -> int:
    """Return the elements per array: more than the caches hold, at most a quarter of the memory in all."""
    return max(1 << 16, min(DEFAULT_NUMEL, available_nbytes // 4 // (_NUM_OPERANDS * BF16.itemsize)))


def round_nbytes(numel: int) -> int:
    """Return the bytes that :func:`measure_memory` tells ``advance``, in all."""
    return (1 + _NUM_ROUNDS) * sum(nbytes for nbytes, _ in _calls(None, numel).values())


def measure_memory(numel: int, advance: Callable[[int], None] = lambda nbytes: None) -> MemoryRates:
    """Measure with arrays of ``numel`` elements in bf16: a base, three models, an output.

    ``advance`` is called with the bytes of each call.
    """
    calls = _calls(make_layer_arrays(BF16, NUM_MODELS, numel), numel)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + _NUM_ROUNDS):
        for name, (nbytes, call) in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            advance(nbytes)
    rates = {name: nbytes / statistics.median(seconds[name]) for name, (nbytes, _) in calls.items()}
    return MemoryRates(**rates)


def _calls(layer: LayerArrays | None, numel: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return bytes and call by name; without a layer only the bytes are of use."""
    array_nbytes = numel * BF16.itemsize
    inputs_nbytes = (1 + NUM_MODELS) * array_nbytes
    calls: dict[str, Callable[[], object]] = dict.fromkeys(MemoryRates.__slots__, lambda: None)
    if layer is not None:
        backend = CpuBackend()
        base, model, out = (layer.arrays[i].ctypes.data for i in (0, 1, -1))
        calls = {
            "memory_read": lambda: _native.bandwidth_read(layer.memory.ctypes.data, inputs_nbytes),
            "memory_triad": lambda: _native.bandwidth_triad(out, base, model, array_nbytes // 4),
            "layer_gram": lambda: backend.layer_gram(layer.table, layer.gram),
            "layer_merge": lambda: backend.layer_merge(layer.table, layer.coefficients, layer.out_table),
        }
    nbytes = {
        "memory_read": inputs_nbytes,
        "memory_triad": 3 * (array_nbytes // 4 * 4),
        "layer_gram": inputs_nbytes,
        "layer_merge": inputs_nbytes + array_nbytes,
    }
    return {name: (nbytes[name], calls[name]) for name in nbytes}
