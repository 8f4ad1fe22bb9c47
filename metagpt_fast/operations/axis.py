"""Linear combinations with coefficients of their own for each row, or column, of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._native import crc32c_join, operand_errors_of
from ..backends.tables import ITEMSIZES, LayerTable, OutputTable, Written
from .base import Row
from .linear import LinearOperation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends import Backend

    FloatArray = NDArray[np.float64]


class AxisOperation(LinearOperation):
    """Rows and columns; tensors whose method has no axis are combined as wholes.

    A row, along the last dimension, is a tensor of its own for the kernels. Columns, along the first dimension, have
    kernels of their own, which see the tensor as a matrix with all other dimensions in one.
    """

    is_cuttable = False

    def __init__(self, rows: Sequence[Row], backend: Backend) -> None:
        super().__init__(rows, backend)
        self.needs_measurement = True
        self._lines: dict[int, FloatArray] = {}  # Gram matrices, then coefficients, of a tensor's rows or columns

    def measure(self, layer: LayerTable, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Measure every row or column, and add them up to the tensors' Gram matrices."""
        assert self.gram is not None
        finite = np.ones(len(rows), np.bool_)
        size = layer.num_operands
        for axis, members in self._by_axis(rows):
            chosen = [rows[k] for k in members]
            part = layer.take(members)
            with operand_errors_of(members):
                if axis is None:
                    finite[members] = super().measure(part, chosen)
                    continue
                grams = self._line_grams(axis, part, chosen)
            for k, number, gram in zip(members, chosen, grams, strict=True):
                self._lines[number] = gram
                self.gram[number, :size, :size] = gram.sum(axis=0)
                finite[k] = bool(np.isfinite(np.diagonal(gram, axis1=1, axis2=2)).all())
        self._is_known = True
        return finite

    def solve(self, rows: Sequence[int]) -> None:
        """Solve row by row; what the report shows is the mean over a tensor's rows."""
        whole = [number for number in rows if self._rows[number].method.axis is None]
        if whole:
            super().solve(whole)
        for number in rows:
            row = self._rows[number]
            if row.method.axis is None or number not in self._lines:  # or combined by the run that this one resumes
                continue
            lines = row.method.solve_rows(self._lines[number], row.has_base)
            self._lines[number] = lines
            self.coefficients[number, : row.num_models] = lines.mean(axis=0) if len(lines) else 0.0

    def combine(self, layer: LayerTable, rows: Sequence[int], out: OutputTable) -> Written:
        """Write every row or column with its own coefficients."""
        written = Written.zeros(len(rows))
        for axis, members in self._by_axis(rows):
            chosen = [rows[k] for k in members]
            part, part_out = layer.take(members), out.take(members)
            with operand_errors_of(members):
                if axis is None:
                    written.put(members, super().combine(part, chosen, part_out))
                else:
                    written.put(members, self._combine_lines(axis, part, chosen, part_out))
        return written

    def is_restorable(self, row: int) -> bool:
        """Return whether the row has one Gram matrix: those of all its rows or columns are too large to keep."""
        return self._rows[row].method.axis is None

    def _combine_lines(self, axis: str, layer: LayerTable, rows: Sequence[int], out: OutputTable) -> Written:
        coefficients = [self._lines.pop(number) for number in rows]
        facts = [self._rows[number] for number in rows]
        if axis == "column":
            columns = np.array([row.num_fibers for row in facts], np.int64)
            return self._backend.column_merge(layer, columns, coefficients, out)
        owners, _ = _split(facts)
        with operand_errors_of(owners):
            lines, lines_out = _lines_of(layer, facts), _output_lines_of(out, facts)
            written = self._backend.layer_merge(lines, np.ascontiguousarray(np.concatenate(coefficients)), lines_out)
        counts = np.bincount(owners, written.num_nonfinite, len(rows)).astype(np.int64)
        # Of results in memory all CRCs are 0, and so is what they are joined to.
        nbytes = lines.numels * ITEMSIZES[lines_out.dtypes].astype(np.int64)
        return Written(counts, crc32c_join(written.crcs, nbytes, owners, len(rows)))

    def _by_axis(self, rows: Sequence[int]) -> list[tuple[str | None, list[int]]]:
        groups: dict[str | None, list[int]] = {}
        for k, number in enumerate(rows):
            groups.setdefault(self._rows[number].method.axis, []).append(k)
        return list(groups.items())

    def _line_grams(self, axis: str, layer: LayerTable, rows: Sequence[int]) -> list[FloatArray]:
        facts = [self._rows[number] for number in rows]
        if axis == "column":
            return self._backend.column_gram(layer, np.array([row.num_fibers for row in facts], np.int64))
        lines = _lines_of(layer, facts)
        gram = np.zeros((lines.num_tensors, layer.num_operands, layer.num_operands))
        with operand_errors_of(_split(facts)[0]):
            self._backend.layer_gram(lines, gram)
        return np.split(gram, np.cumsum([row.num_rows for row in facts])[:-1])


def _split(facts: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return for every row of these tensors which tensor it belongs to, and its first element there."""
    counts = np.array([row.num_rows for row in facts], np.int64)
    owners = np.repeat(np.arange(len(facts)), counts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.array([row.num_columns for row in facts], np.int64)
    return owners, (numbers * lengths[owners]).astype(np.uint64)


def _lines_of(layer: LayerTable, facts: Sequence[Row]) -> LayerTable:
    """Return the table in which each row of each tensor is a tensor."""
    owners, firsts = _split(facts)
    dtypes = layer.dtypes[owners]
    lengths = np.array([row.num_columns for row in facts], np.int64)
    addresses = layer.addresses[owners] + firsts[:, None] * ITEMSIZES[dtypes]
    return LayerTable(addresses, layer.files[owners], dtypes, lengths[owners], layer.has_base)


def _output_lines_of(out: OutputTable, facts: Sequence[Row]) -> OutputTable:
    owners, firsts = _split(facts)
    dtypes = out.dtypes[owners]
    return OutputTable(out.addresses[owners] + firsts * ITEMSIZES[dtypes], out.files[owners], dtypes)
