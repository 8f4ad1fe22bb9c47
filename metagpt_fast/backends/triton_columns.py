"""Kernels that see a tensor as rows and columns, on a GPU: column_merge in Triton, the others with torch's operations.

Few methods need them and none is bound by them, so fp64 copies of some rows at a time are good enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels import launch
from .tables import ITEMSIZES, LayerTable
from .triton_launches import groups_of, upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device_memory import DeviceMemory
    from .tables import OutputTable

_MOST_WIDENED = 1 << 22  # elements of an operand
_SOFTMAX_EPSILON = 1e-8


def merge(
    memory: DeviceMemory,
    layer: LayerTable,
    columns: NDArray[np.int64],
    coefficients: Sequence[NDArray[np.float64]],
    out: OutputTable,
    nonfinite: Any,
) -> None:
    """Write the merged tensors with coefficients per column, K arrays float64 ``[C, T]``."""
    from ..kernels.column_merge import column_merge_kernel

    tables_of_coefficients = [memory.upload(np.ascontiguousarray(each)) for each in coefficients]
    lines = np.zeros((layer.num_tensors, 2), np.int64)
    lines[:, 0] = np.maximum(columns, 1)
    lines[:, 1] = [each.data_ptr() for each in tables_of_coefficients]
    lines_on_device = memory.upload(lines)
    for group in groups_of(layer, out):
        parameters = launch.merge_launch(group.dtypes, group.out_dtype)
        tables = upload(memory, group, parameters.block_numel)
        with memory.current():
            column_merge_kernel[(tables.num_programs,)](
                tables.records,
                tables.entries,
                tables.tiles_per_entry,
                lines_on_device,
                nonfinite,
                DTYPES=group.dtypes,
                OUT_DTYPE=group.out_dtype,
                HAS_BASE=layer.has_base,
                WIDE=group.is_wide or group.out_dtype == launch.F64,
                ALIGNMENT=group.alignment,
                BLOCK=parameters.block_numel,
                num_warps=parameters.num_threads // memory.warp_size,
                enable_fp_fusion=False,
            )


def gram(memory: DeviceMemory, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return the Gram matrix of every column, K arrays float64 ``[C, V, V]``."""
    grams = []
    for k in range(layer.num_tensors):
        size, num_columns = layer.num_operands, int(columns[k])
        total = memory.zeros((num_columns, size, size))
        for rows in _widened_rows(memory, layer.take([k]), num_columns):
            if layer.has_base:
                rows[1:] -= rows[0].clone()
            by_column = rows.permute(2, 0, 1)
            total += by_column @ by_column.transpose(1, 2)
        grams.append(total.cpu().numpy())
    return grams


def row_divergence(memory: DeviceMemory, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return Σ p log(p/q) of every row, as terms that do not cancel: K arrays float64 ``[numel / columns]``."""
    divergences = []
    for k in range(layer.num_tensors):
        parts = [np.empty(0)]
        for rows in _widened_rows(memory, layer.take([k]), int(columns[k])):
            q, p = rows.softmax(dim=2) + _SOFTMAX_EPSILON
            parts.append((p * (p / q).log() - p + q).sum(dim=1).cpu().numpy())
        divergences.append(np.concatenate(parts))
    return divergences


def _widened_rows(memory: DeviceMemory, layer: LayerTable, num_columns: int) -> Iterator[Any]:
    """Yield some rows at a time of a layer that is one tensor: float64 ``[V, rows, columns]`` on the device."""
    from ..kernels.widen import widen_kernel

    step = max(1, _MOST_WIDENED // max(num_columns, 1)) * num_columns
    for first in range(0, int(layer.numels[0]), max(step, 1)):
        numel = min(step, int(layer.numels[0]) - first)
        addresses = layer.addresses + np.uint64(first) * ITEMSIZES[layer.dtypes]
        part = LayerTable(addresses, layer.files, layer.dtypes, np.array([numel], np.int64), layer.has_base)
        (group,) = groups_of(part)
        parameters = launch.merge_launch(group.dtypes, launch.F64)
        tables = upload(memory, group, parameters.block_numel)
        values = memory.empty((layer.num_operands, numel))
        with memory.current():
            widen_kernel[(tables.num_programs,)](
                tables.records,
                tables.entries,
                tables.tiles_per_entry,
                values,
                DTYPES=group.dtypes,
                ALIGNMENT=group.alignment,
                BLOCK=parameters.block_numel,
                num_warps=parameters.num_threads // memory.warp_size,
                enable_fp_fusion=False,
            )
        yield values.view(layer.num_operands, -1, num_columns)
