"""Sparse methods: rules → thresholds → moments → an election on every element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .._native import operand_errors_of
from ..backends.tables import LayerElection, Written
from ..methods.sparse import Election, SparseMethod
from .base import Operation, Row
from .masks import KeyKind, Masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends import Backend
    from ..backends.tables import LayerTable, OutputTable

    FloatArray = NDArray[np.float64]


class SparseOperation(Operation):
    """Masks and elections. Thresholds are those of whole tensors, so tensors are not cut."""

    is_cuttable = False

    def __init__(self, rows: Sequence[Row], backend: Backend) -> None:
        super().__init__(rows, backend)
        most = self.coefficients.shape[1]
        self._masks = Masks(rows, most)
        self._moments = np.zeros((len(rows), most, 6))
        self._elections: dict[int, Election] = {}
        needs_moments = any(_method(row).needs_moments for row in rows)
        self.needs_measurement = needs_moments or self._masks.needs_thresholds
        self.is_local = not self._masks.rank_rows

    def measure(self, layer: LayerTable, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Find the thresholds of a layer's tensors, then sum what their masks keep."""
        self._masks.measure(self._backend, layer, rows)
        finite = np.ones(len(rows), np.bool_)
        wanted = [k for k, number in enumerate(rows) if _method(self._rows[number]).needs_moments]
        for key_kind, members in self._by_key_kind(rows, wanted):
            chosen = [rows[k] for k in members]
            self._masks.remember(chosen)
            masks = self._masks.table(chosen, layer.num_operands - 1, key_kind)
            with operand_errors_of(members):
                moments = self._backend.layer_moments(layer.take(members), masks)
            self._moments[chosen, : moments.shape[1]] = moments
            finite[members] = np.isfinite(moments).all(axis=(1, 2))
        return finite

    def solve(self, rows: Sequence[int]) -> None:
        """Sum the scope's squared norms, and let each tensor's method say how models are combined."""
        most = self.coefficients.shape[1]
        squares = np.zeros(most)
        for number in rows:
            row = self._rows[number]
            squares[: row.num_models] += _method(row).squares(self._moments[number, : row.num_models])
        for number in rows:
            row = self._rows[number]
            size = row.num_models
            election = _method(row).election(self._moments[number, :size], squares[:size])
            self._elections[number] = election
            self.coefficients[number, :size] = election.weights * election.factor

    def combine(self, layer: LayerTable, rows: Sequence[int], out: OutputTable) -> Written:
        """Write base + λ Σ w r m δ / Σ w."""
        written = Written.zeros(len(rows))
        for key_kind, members in self._by_key_kind(rows, range(len(rows))):
            chosen = [rows[k] for k in members]
            masks = self._masks.table(chosen, layer.num_operands - 1, key_kind)
            elections = layer_election([self._elections.pop(number) for number in chosen])
            with operand_errors_of(members):
                part = self._backend.layer_elect(layer.take(members), masks, elections, out.take(members))
            written.put(members, part)
        self._masks.forget(rows)
        return written

    def state(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return thresholds and moments."""
        return {"moments": self._moments[rows], **self._masks.state(rows)}

    def restore(self, rows: Sequence[int], state: dict[str, NDArray[Any]]) -> None:
        """Take thresholds and moments as measured."""
        self._moments[rows] = state["moments"]
        self._masks.restore(rows, state)

    def is_restorable(self, row: int) -> bool:
        """Return whether the row's masks need nothing but thresholds."""
        return self._masks.is_restorable(row)

    def _by_key_kind(self, rows: Sequence[int], members: Sequence[int]) -> Iterator[tuple[KeyKind, list[int]]]:
        """Yield the members that one kernel call can take together."""
        groups: dict[KeyKind, list[int]] = {}
        for k in members:
            groups.setdefault(self._masks.key_kind(rows[k]), []).append(k)
        yield from groups.items()


def layer_election(elections: Sequence[Election]) -> LayerElection:
    """Return the kernels' table of these elections, one per tensor."""
    scales = np.array([each.scales for each in elections], np.float64)
    ones = np.ones(scales.shape[1])
    return LayerElection(
        scales=scales,
        votes=np.array([each.scales if each.votes is None else each.votes for each in elections], np.float64),
        weights=np.array([each.weights for each in elections], np.float64),
        uniques=np.array([ones if each.uniques is None else each.uniques for each in elections], np.float64),
        lambdas=np.array([each.factor for each in elections], np.float64),
        floors=np.array([each.floor for each in elections], np.float64),
        elects=np.array([each.elects for each in elections], np.uint8),
        normalizes=np.array([each.normalizes for each in elections], np.uint8),
    )


def _method(row: Row) -> SparseMethod:
    return cast("SparseMethod", row.method)
