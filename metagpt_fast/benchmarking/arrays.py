"""A layer in memory that is too large for the caches, as the kernels take it and as NumPy and torch see it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..backends.tables import MEMORY, LayerTable, OutputTable, layer_table, output_table
from ..dtypes import BF16, F16, F32, DType
from ..reference import round_from_float32

DTYPES: dict[str, DType] = {"bf16": BF16, "f16": F16, "f32": F32}
DEFAULT_NUMEL = 64 << 20
_POOL_NUMEL = 1 << 20
_HUGE_PAGE_NBYTES = 2 << 20
_PAGE_NBYTES = 4096
_SEED = 7

Raw = NDArray[np.uint8]


@dataclass(frozen=True)
class LayerArrays:
    """A base, T models and an output of one dtype, each ``numel`` elements, in one block of memory.

    ``memory`` is the whole block: what bandwidth is measured on, so that kernel and ceiling use the same pages.
    """

    dtype: DType
    numel: int
    memory: Raw
    offsets: tuple[int, ...]  # of base, models, output

    @property
    def num_models(self) -> int:
        """Return T."""
        return len(self.offsets) - 2

    @cached_property
    def arrays(self) -> list[Raw]:
        """Return the bytes of base, models and output."""
        nbytes = self.numel * self.dtype.itemsize
        return [self.memory[offset : offset + nbytes] for offset in self.offsets]

    @cached_property
    def table(self) -> LayerTable:
        """Return base and models as the kernels take them: one tensor."""
        code = self._code()
        return layer_table([[(a.ctypes.data, MEMORY, code) for a in self.arrays[:-1]]], [self.numel], True)

    @cached_property
    def out_table(self) -> OutputTable:
        """Return the output as the kernels take it."""
        return output_table([(self.arrays[-1].ctypes.data, MEMORY, self._code())])

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        """Return where layer_gram adds its sums."""
        return np.zeros((1, 1 + self.num_models, 1 + self.num_models))

    @cached_property
    def coefficients(self) -> NDArray[np.float64]:
        """Return MetaGPT-like coefficients, which sum to 1."""
        weights = 0.25 ** np.arange(self.num_models)
        return np.ascontiguousarray((weights / weights.sum())[None, :])

    def _code(self) -> int:
        assert self.dtype.code is not None  # DTYPES are mergeable
        return self.dtype.code


def make_layer_arrays(dtype: DType, num_models: int, numel: int) -> LayerArrays:
    """Return arrays with the values of a family: weights σ 0.02, task vectors σ 1e-3 and less.

    The arrays are staggered: array i begins at another offset modulo 2 MiB, page-aligned, spread by the golden ratio.
    Streams at the same offset modulo 2 MiB walk through the same DRAM banks and cache sets in step, and measured 20 %
    slower for the kernels; tensors of checkpoint files lie staggered, because of their sizes and of the headers.
    """
    nbytes = numel * dtype.itemsize
    offsets, end = [], 0
    for i in range(num_models + 2):
        stagger = int(i * 0.618034 % 1 * _HUGE_PAGE_NBYTES) // _PAGE_NBYTES * _PAGE_NBYTES
        offset = -(-end // _HUGE_PAGE_NBYTES) * _HUGE_PAGE_NBYTES + stagger
        offsets.append(offset)
        end = offset + nbytes
    memory = _huge_block(end)
    noise = np.random.default_rng(_SEED).standard_normal((num_models + 1, _POOL_NUMEL), np.float32)
    weights = noise[0] * np.float32(0.02)
    layer = LayerArrays(dtype, numel, memory, tuple(offsets))
    for i, array in enumerate(layer.arrays):
        if i == num_models + 1:
            array[:] = 0  # the output: touched, so that no round pays for page faults
            continue
        values = weights if i == 0 else weights + noise[i] * np.float32(1e-3 * 0.5 ** (i - 1))
        _tile(array, round_from_float32(values, dtype))
    return layer


def _huge_block(nbytes: int) -> Raw:
    """Return memory that begins at a multiple of 2 MiB, on huge pages where the system grants them."""
    mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE_NBYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE_NBYTES
    return whole[start : start + nbytes]


def _tile(target: Raw, pattern: Raw) -> None:
    """Fill ``target`` with repetitions of ``pattern``."""
    for start in range(0, target.size, pattern.size):
        part = target[start : start + pattern.size]
        part[:] = pattern[: part.size]
