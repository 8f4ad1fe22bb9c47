"""The native kernels as functions of buffers: builds the tables of addresses that they take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from metagpt_fast import _native
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.tables import LayerTable, output_table
from metagpt_fast.dtypes import DType

from .arrays import GUARD_NBYTES, POISON, FloatArray, Raw


class HasAddress(Protocol):
    """What a buffer offers; ``descriptor`` is the file that ``address`` is an offset in, or IN_MEMORY."""

    dtype: DType
    numel: int

    @property
    def descriptor(self) -> int: ...
    @property
    def raw(self) -> Raw: ...
    @property
    def address(self) -> int: ...
    @property
    def operand(self) -> tuple[Raw, DType]: ...


BufferLayer = Sequence[Sequence[HasAddress]]


@contextmanager
def kernels(*, isa: str | None = None, num_threads: int | None = None) -> Iterator[None]:
    """Run kernels with this ISA and number of threads, then restore what was set."""
    old_isa, old_num_threads = _native.isa(), _native.num_threads()
    try:
        if isa is not None:
            _native.set_isa(isa)
        if num_threads is not None:
            _native.set_num_threads(num_threads)
        yield
    finally:
        _native.set_isa(old_isa)
        _native.set_num_threads(old_num_threads)


def operands(layer: BufferLayer) -> list[list[tuple[Raw, DType]]]:
    """Return the layer as metagpt_fast.reference takes it."""
    return [[buffer.operand for buffer in tensor] for tensor in layer]


def gram(layer: BufferLayer, has_base: bool = True, *, into: FloatArray | None = None) -> FloatArray:
    """Return the layer's Gram matrices, added to ``into`` if that is given."""
    num_vectors = len(layer[0])
    result = np.zeros((len(layer), num_vectors, num_vectors)) if into is None else into
    _native.layer_gram(*_tables(layer), has_base, result)
    return result


def merge(
    layer: BufferLayer, coefficients: FloatArray, out: Sequence[HasAddress], has_base: bool = True
) -> NDArray[np.int64]:
    """Write the merged tensors into ``out`` and return how many elements of each are not finite."""
    counts, _ = _native.layer_merge(
        *_tables(layer),
        has_base,
        coefficients,
        np.array([buffer.address for buffer in out], dtype=np.uint64),
        np.array([buffer.descriptor for buffer in out], dtype=np.int32),
        np.array([buffer.dtype.code for buffer in out], dtype=np.uint8),
    )
    return counts


def count_nonfinite(layer: BufferLayer, has_base: bool = True) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of non-finite elements of each operand, and the index of the first."""
    return _native.layer_nonfinite(*_tables(layer), has_base)


def row_divergence(layer: BufferLayer, columns: Sequence[int]) -> list[FloatArray]:
    """Return the divergence of every row."""
    return CpuBackend().layer_row_divergence(layer_table_of(layer), np.array(columns, dtype=np.int64))


def column_gram(
    layer: BufferLayer, columns: Sequence[int], has_base: bool = True, *, into: list[FloatArray] | None = None
) -> list[FloatArray]:
    """Return the Gram matrices of every column, added to ``into`` if that is given."""
    return CpuBackend().column_gram(layer_table_of(layer, has_base), np.array(columns, dtype=np.int64), into)


def column_merge(
    layer: BufferLayer,
    columns: Sequence[int],
    coefficients: Sequence[FloatArray],
    out: Sequence[HasAddress],
    has_base: bool = True,
) -> NDArray[np.int64]:
    """Write the merged tensors into ``out`` and return how many elements of each are not finite."""
    places = output_table([(buffer.address, buffer.descriptor, dtype_code(buffer)) for buffer in out])
    table = layer_table_of(layer, has_base)
    return CpuBackend().column_merge(table, np.array(columns, dtype=np.int64), coefficients, places).num_nonfinite


def dtype_code(buffer: HasAddress) -> int:
    """Return the code that the kernels know the dtype by."""
    assert buffer.dtype.code is not None
    return buffer.dtype.code


def layer_table_of(layer: BufferLayer, has_base: bool = True) -> LayerTable:
    """Return the table that a backend takes."""
    return LayerTable(*_tables(layer), has_base)


def _tables(
    layer: BufferLayer,
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
    return (
        np.array([[buffer.address for buffer in tensor] for tensor in layer], dtype=np.uint64),
        np.array([[buffer.descriptor for buffer in tensor] for tensor in layer], dtype=np.int32),
        np.array([[buffer.dtype.code for buffer in tensor] for tensor in layer], dtype=np.uint8),
        np.array([tensor[0].numel for tensor in layer], dtype=np.int64),
    )


class FileBuffer:
    """A tensor in an open file, at any offset, between poisoned bytes."""

    def __init__(self, path: Path, source: HasAddress, data_offset: int) -> None:
        self.dtype, self.numel = source.dtype, source.numel
        self.address = data_offset  # what the kernels take in its place
        self.path = path
        guard = np.full(GUARD_NBYTES, POISON, dtype=np.uint8)
        before = np.full(data_offset, POISON, dtype=np.uint8)
        path.write_bytes(before.tobytes() + source.raw.tobytes() + guard.tobytes())
        self.descriptor = os.open(path, os.O_RDWR)

    @property
    def raw(self) -> Raw:
        memory = np.fromfile(self.path, dtype=np.uint8)
        return memory[self.address : self.address + self.numel * self.dtype.itemsize]

    @property
    def operand(self) -> tuple[Raw, DType]:
        return self.raw, self.dtype

    def guards_intact(self) -> bool:
        memory = np.fromfile(self.path, dtype=np.uint8)
        after = memory[self.address + self.numel * self.dtype.itemsize :]
        before = memory[: self.address]
        return after.size == GUARD_NBYTES and bool(np.all(before == POISON) and np.all(after == POISON))

    def poison(self) -> None:
        os.pwrite(self.descriptor, bytes([POISON]) * (self.numel * self.dtype.itemsize), self.address)

    def reopen_for_reading(self) -> None:
        os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.descriptor)
