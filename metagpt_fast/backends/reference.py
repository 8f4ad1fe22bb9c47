"""The NumPy reference as a backend: slow, and independent of the kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import reference, reference_rows
from ..dtypes import DTYPES, DType
from .tables import MEMORY, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tables import LayerTable, OutputTable

_BY_CODE = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code is not None}


class ReferenceBackend:
    """metagpt_fast.reference behind the backend interface."""

    name = "reference"

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        for k in range(layer.num_tensors):
            gram[k] += reference.layer_gram([_operands(layer, k)], layer.has_base)[0]

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_nonfinite = np.zeros(layer.num_tensors, np.int64)
        for k in range(layer.num_tensors):
            dtype = _BY_CODE[int(out.dtypes[k])]
            (raw,) = reference.layer_merge([_operands(layer, k)], coefficients[k : k + 1], [dtype], layer.has_base)
            num_nonfinite[k] = reference.count_nonfinite(raw, dtype)[0]
            _write(int(out.addresses[k]), int(out.files[k]), raw)
        return num_nonfinite

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        found = np.array(
            [
                [reference.count_nonfinite(*operand) for operand in _operands(layer, k)]
                for k in range(layer.num_tensors)
            ],
            np.int64,
        )
        return found[..., 0], found[..., 1]

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        tensors = range(layer.num_tensors)
        return [reference_rows.layer_row_divergence([_operands(layer, k)], [int(columns[k])])[0] for k in tensors]

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        tensors = range(layer.num_tensors)
        grams = [
            reference_rows.column_gram([_operands(layer, k)], [int(columns[k])], layer.has_base)[0] for k in tensors
        ]
        if gram is None:
            return grams
        return [np.add(total, added, out=total) for total, added in zip(gram, grams, strict=True)]

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        num_nonfinite = np.zeros(layer.num_tensors, np.int64)
        for k in range(layer.num_tensors):
            dtype = _BY_CODE[int(out.dtypes[k])]
            (raw,) = reference_rows.column_merge(
                [_operands(layer, k)], [int(columns[k])], [coefficients[k]], [dtype], layer.has_base
            )
            num_nonfinite[k] = reference.count_nonfinite(raw, dtype)[0]
            _write(int(out.addresses[k]), int(out.files[k]), raw)
        return num_nonfinite


def _operands(layer: LayerTable, k: int) -> list[tuple[NDArray[np.uint8], DType]]:
    operands = []
    for address, file, code in zip(layer.addresses[k], layer.files[k], layer.dtypes[k], strict=True):
        dtype = _BY_CODE[int(code)]
        nbytes = int(layer.numels[k]) * dtype.itemsize
        operands.append((_read(int(address), int(file), nbytes), dtype))
    return operands


def _read(address: int, file: int, nbytes: int) -> NDArray[np.uint8]:
    if nbytes == 0:
        return np.empty(0, np.uint8)
    if file == MEMORY:
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
    raw = np.empty(nbytes, np.uint8)
    view = raw.data
    done = 0
    while done < nbytes:
        count = os.preadv(file, [view[done:]], address + done)
        if count == 0:
            raise OSError(0, f"the file ended early, at byte {address + done}")
        done += count
    return raw


def _write(address: int, file: int, raw: NDArray[np.uint8]) -> None:
    if file == MEMORY:
        ctypes.memmove(address, raw.ctypes.data, raw.nbytes)
        return
    view = np.ascontiguousarray(raw).data
    done = 0
    while done < raw.nbytes:
        done += os.pwrite(file, view[done:], address + done)
