"""The NumPy reference as a backend: slow, and independent of the kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .. import reference, reference_elect, reference_masks, reference_moments, reference_rows, reference_threshold
from .._native import crc32c, file_operand_error
from ..dtypes import DTYPES, DType
from .tables import MEMORY, Written, add_grams, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tables import LayerElection, LayerTable, MaskTable, OutputTable

_BY_CODE = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code is not None}


class ReferenceBackend:
    """metagpt_fast.reference behind the backend interface."""

    name = "reference"

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        for k in range(layer.num_tensors):
            gram[k] += reference.layer_gram([_operands(layer, k)], layer.has_base)[0]

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        written = Written.zeros(layer.num_tensors)
        for k in range(layer.num_tensors):
            dtype = _BY_CODE[int(out.dtypes[k])]
            (raw,) = reference.layer_merge([_operands(layer, k)], coefficients[k : k + 1], [dtype], layer.has_base)
            with _operand_errors(k, -1):
                self._put(written, k, out, raw, dtype)
        return written

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
        return add_grams(grams, gram)

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        written = Written.zeros(layer.num_tensors)
        for k in range(layer.num_tensors):
            dtype = _BY_CODE[int(out.dtypes[k])]
            (raw,) = reference_rows.column_merge(
                [_operands(layer, k)], [int(columns[k])], [coefficients[k]], [dtype], layer.has_base
            )
            with _operand_errors(k, -1):
                self._put(written, k, out, raw, dtype)
        return written

    def layer_threshold(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
        ranks: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        keys, indices = np.zeros(ranks.shape, np.uint32), np.zeros(ranks.shape, np.int64)
        for k in range(layer.num_tensors):
            rule = _key_rule(layer, k, columns, row_factors, key_kind)
            keys[k], indices[k] = reference_threshold.threshold(_operands(layer, k), rule, ranks[k])
        return keys, indices

    def layer_count_nonzero(
        self, layer: LayerTable, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
    ) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_keys = 1 if key_kind == reference_masks.VARIANCE else layer.num_operands - 1
        counts = np.zeros((layer.num_tensors, num_keys), np.int64)
        for k in range(layer.num_tensors):
            rule = _key_rule(layer, k, columns, row_factors, key_kind)
            counts[k] = reference_threshold.count_nonzero(_operands(layer, k), rule)
        return counts

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        moments = np.zeros((*masks.kinds.shape, 6))
        for k in range(layer.num_tensors):
            rule = _key_rule(layer, k, masks.columns, masks.row_factors, masks.key_kind)
            moments[k] = reference_moments.moments(_operands(layer, k), _mask_rules(masks, k), rule)
        return moments

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        written = Written.zeros(layer.num_tensors)
        for k in range(layer.num_tensors):
            dtype = _BY_CODE[int(out.dtypes[k])]
            rule = _key_rule(layer, k, masks.columns, masks.row_factors, masks.key_kind)
            row = reference_elect.Election(
                election.scales[k],
                election.votes[k],
                election.weights[k],
                election.uniques[k],
                float(election.lambdas[k]),
                float(election.floors[k]),
                bool(election.elects[k]),
                bool(election.normalizes[k]),
            )
            raw = reference_elect.elect(_operands(layer, k), _mask_rules(masks, k), rule, row, dtype)
            with _operand_errors(k, -1):
                self._put(written, k, out, raw, dtype)
        return written

    def _put(self, written: Written, k: int, out: OutputTable, raw: reference.Raw, dtype: DType) -> None:
        """Write one result to its place, and note what it is."""
        _write(int(out.addresses[k]), int(out.files[k]), raw)
        written.num_nonfinite[k] = reference.count_nonfinite(raw, dtype)[0]
        if out.files[k] != MEMORY:
            written.crcs[k] = crc32c(np.ascontiguousarray(raw))


def _operands(layer: LayerTable, k: int) -> list[tuple[NDArray[np.uint8], DType]]:
    operands = []
    for i, (address, file, code) in enumerate(zip(layer.addresses[k], layer.files[k], layer.dtypes[k], strict=True)):
        dtype = _BY_CODE[int(code)]
        nbytes = int(layer.numels[k]) * dtype.itemsize
        with _operand_errors(k, i):
            operands.append((read_bytes(int(address), int(file), nbytes), dtype))
    return operands


@contextmanager
def _operand_errors(tensor: int, operand: int) -> Iterator[None]:
    """Say which tensor and operand could not be read, or with operand −1 written, as the kernels do."""
    try:
        yield
    except OSError as error:
        raise file_operand_error(error, tensor, operand) from error


def read_bytes(address: int, file: int, nbytes: int) -> NDArray[np.uint8]:
    """Return bytes of memory, in place, or of a file; raises OSError where the file ends early."""
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


def _key_rule(
    layer: LayerTable, k: int, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
) -> reference_masks.KeyRule:
    num_columns, address, factors = int(columns[k]), int(row_factors[k]), None
    if key_kind == reference_masks.IMPORTANCE:
        num_rows = int(layer.numels[k]) // max(num_columns, 1)
        factors = read_bytes(address, MEMORY, num_rows * 8).view(np.float64)
    return reference_masks.KeyRule(key_kind, num_columns, factors)


def _mask_rules(masks: MaskTable, k: int) -> list[reference_masks.MaskRule]:
    return [
        reference_masks.MaskRule(kind, tuple(keys), tuple(indices), tuple(probabilities), stream, value)
        for kind, keys, indices, probabilities, stream, value in zip(
            masks.kinds[k].tolist(),
            masks.keys[k].tolist(),
            masks.indices[k].tolist(),
            masks.probabilities[k].tolist(),
            masks.streams[k].tolist(),
            masks.values[k].tolist(),
            strict=True,
        )
    ]
