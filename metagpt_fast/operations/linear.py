"""Linear combinations: Gram matrix → coefficients → layer_merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..untrusted import brief
from .base import Operation, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends import Backend
    from ..backends.tables import LayerTable, OutputTable, Written

    FloatArray = NDArray[np.float64]


class LinearOperation(Operation):
    """One set of coefficients per scope, for whole tensors."""

    def __init__(self, rows: Sequence[Row], backend: Backend, gram: FloatArray | None = None) -> None:
        super().__init__(rows, backend)
        self._is_known = gram is not None
        self.needs_measurement = gram is None and any(row.method.needs_measurement for row in rows)
        num_vectors = max((row.num_models + row.has_base for row in rows), default=1)
        self.gram = np.zeros((len(rows), num_vectors, num_vectors)) if gram is None else gram

    def measure(self, layer: LayerTable, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Add the Gram matrices of a layer."""
        assert self.gram is not None  # set by the constructor
        size = layer.num_operands
        sums = np.ascontiguousarray(self.gram[rows, :size, :size])
        self._backend.layer_gram(layer, sums)
        self.gram[rows, :size, :size] = sums
        self._is_known = True
        return np.asarray(np.isfinite(np.diagonal(sums, axis1=1, axis2=2)).all(axis=1))

    def solve(self, rows: Sequence[int]) -> None:
        """Sum the scope's Gram matrices and let each tensor's method solve for its coefficients."""
        assert self.gram is not None
        with np.errstate(over="ignore", invalid="ignore"):
            total = self.gram[rows].sum(axis=0)
        if not np.isfinite(total.diagonal()).all():
            where = f"tensors from {brief(self._rows[rows[0]].name)} on"
            raise DataError("the squared norm over several tensors overflows float64", where=where)
        solved: dict[int, FloatArray] = {}  # by the method's identity: a plan shares instances
        for number in rows:
            row = self._rows[number]
            if id(row.method) not in solved:
                size = row.num_models + row.has_base
                solved[id(row.method)] = row.method.solve(total[:size, :size], row.has_base)
            self.coefficients[number, : row.num_models] = solved[id(row.method)]

    def combine(self, layer: LayerTable, rows: Sequence[int], out: OutputTable) -> Written:
        """Write base + Σ c τ."""
        num_models = layer.num_operands - layer.has_base
        return self._backend.layer_merge(layer, np.ascontiguousarray(self.coefficients[rows, :num_models]), out)

    def state(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return the Gram matrices."""
        assert self.gram is not None
        return {"gram": self.gram[rows]}

    def restore(self, rows: Sequence[int], state: dict[str, NDArray[Any]]) -> None:
        """Take the Gram matrices as measured."""
        assert self.gram is not None
        self.gram[rows] = state["gram"]
        self._is_known = True

    def is_unchanged(self, row: int) -> bool:
        """Return whether every task vector of the tensor was measured, and is zero."""
        assert self.gram is not None
        return self._is_known and self._rows[row].has_base and not self.gram[row].diagonal()[1:].any()
