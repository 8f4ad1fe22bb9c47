"""What a launch on a device takes: a layer's tables in one block of bytes, and which kernel takes which tensor.

csrc/cuda/layer_table.h reads it: the columns one after another, those of 8 bytes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import F64

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_NUMEL = 4096
SPAN_NUMEL = 64 * BLOCK_NUMEL
"""Elements of a block and of a span: sizes of the numerical contract (docs/numerics.md)."""

GENERAL, FP64, UNIFORM = 0, 1, 2
"""Kinds of tensors: any dtypes in fp32; with F64; UNIFORM + dtype code: all operands of one dtype, 16-byte aligned."""

_GRAM_UNIFORM_OPERANDS = frozenset({2, 3, 4, 5, 9})  # what gram_uniform_kernel is compiled for


@dataclass(frozen=True)
class Launch:
    """One call of a kernel on a device, whose table is there, or will be when the stream comes to it.

    Attributes:
        table_address: of the table, on the device.
        num_tensors, num_operands, has_base: K, V, and whether operand 0 is the base.
        num_blocks, num_spans: of all tensors.
        kinds: bit b is set if a tensor is of kind b.
        reads: address and bytes of the device memory that table and operands are in.
        writes: of the outputs; 0 bytes without any.
    """

    table_address: int
    num_tensors: int
    num_operands: int
    has_base: bool
    num_blocks: int
    num_spans: int
    kinds: int
    reads: tuple[int, int]
    writes: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class DeviceTable:
    """K tensors, or pieces of them, with V operands each, in device memory.

    ``out_addresses`` and ``out_dtypes`` are zeros, and ``coefficients`` are not looked at, where a layer is measured.
    """

    addresses: NDArray[np.uint64]  # [K, V]
    dtypes: NDArray[np.uint8]  # [K, V]
    numels: NDArray[np.int64]  # [K]
    has_base: bool
    rows: NDArray[np.int64]  # [K] where in the results
    out_addresses: NDArray[np.uint64]  # [K]
    out_dtypes: NDArray[np.uint8]  # [K]
    coefficients: NDArray[np.float64]  # [K, T]


def table_nbytes(num_tensors: int, num_operands: int, has_base: bool) -> int:
    """Return the size of a table in bytes."""
    words = num_tensors * (num_operands + 5 + num_operands - has_base) + 2
    return 8 * words + num_tensors * (num_operands + 2)


def num_blocks_of(numels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the blocks of each tensor, int64 ``[K]``."""
    return -(-numels // BLOCK_NUMEL)


def kinds_of(table: DeviceTable, *, merges: bool) -> NDArray[np.uint8]:
    """Return which kernel takes each tensor, uint8 ``[K]``.

    Args:
        table: the tensors.
        merges: for a merge, whose output counts too; else for a measurement.
    """
    dtypes = table.dtypes
    is_fp64 = (dtypes == F64.code).any(axis=1)
    is_uniform = (dtypes == dtypes[:, :1]).all(axis=1) & (table.addresses % 16 == 0).all(axis=1)
    if merges:
        is_fp64 |= table.out_dtypes == F64.code
        is_uniform &= table.out_addresses % 16 == 0
    elif dtypes.shape[1] not in _GRAM_UNIFORM_OPERANDS:
        is_uniform[:] = False
    kinds = np.where(is_uniform, UNIFORM + dtypes[:, 0], GENERAL).astype(np.uint8)
    kinds[is_fp64] = FP64
    return kinds


def pack(table: DeviceTable, *, merges: bool) -> tuple[NDArray[np.uint8], int, int, int]:
    """Return the table's bytes, the number of its blocks and spans, and the set of its kinds, as bits."""
    num_blocks = num_blocks_of(table.numels)
    num_spans = -(-table.numels // SPAN_NUMEL)
    kinds = kinds_of(table, merges=merges)
    columns: tuple[NDArray[np.generic], ...] = (
        table.addresses,
        table.out_addresses,
        table.numels,
        np.concatenate([[0], np.cumsum(num_blocks)]),
        np.concatenate([[0], np.cumsum(num_spans)]),
        table.rows,
        table.coefficients,
        table.dtypes,
        table.out_dtypes,
        kinds,
    )
    packed = np.concatenate([np.ascontiguousarray(column).reshape(-1).view(np.uint8) for column in columns])
    present = int(np.bitwise_or.reduce(np.left_shift(1, kinds.astype(np.int64)), initial=0))
    return packed, int(num_blocks.sum()), int(num_spans.sum()), present
