"""What the loop asks of an operation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..methods import Method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends import Backend
    from ..backends.tables import LayerTable, OutputTable, Written

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor that is merged: what an operation has to know of it.

    Attributes:
        name: its name in the output; random masks depend on it.
        shape: its shape.
        method: how it is merged, with its parameters.
        num_models: T, the models that are combined.
        has_base: whether their task vectors are added to a base, which is then the first operand.
    """

    name: str
    shape: tuple[int, ...]
    method: Method
    num_models: int
    has_base: bool

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def num_columns(self) -> int:
        """Return the length of a row: the last dimension; a tensor of fewer than two dimensions is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def num_fibers(self) -> int:
        """Return the number of vectors along the first dimension: a matrix's columns; a vector is one."""
        return math.prod(self.shape[1:])


class Operation(ABC):
    """Measures, solves and combines; keeps what it measured by row.

    Attributes:
        is_cuttable: whether a tensor may be measured and combined in pieces. If not, a layer has whole tensors.
        is_local: whether, once solved, an element of the output depends on the operands' elements of its place only:
            such an output may be an operand's own memory.
        needs_measurement: whether ``measure`` has to see every tensor before ``solve``.
        coefficients: float64 ``[N, T]``, NaN until solved: what the report shows. T is the most models of a row; the
            columns behind a row's own models stay NaN.
        gram: float64 ``[N, V, V]`` of each row's operands, or None if none is measured.
    """

    is_cuttable = True
    is_local = True

    def __init__(self, rows: Sequence[Row], backend: Backend) -> None:
        self._rows = rows
        self._backend = backend
        self.needs_measurement = True
        most = max((row.num_models for row in rows), default=1)
        self.coefficients: FloatArray = np.full((len(rows), most), np.nan)
        self.gram: FloatArray | None = None

    @abstractmethod
    def measure(self, layer: LayerTable, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Measure the tensors of a layer, or pieces of them in ascending order.

        Args:
            layer: K tensors, all with the same number of operands.
            rows: which rows they are, K of them.

        Returns:
            bool ``[K]``: whether what was measured so far is finite.
        """

    @abstractmethod
    def solve(self, rows: Sequence[int]) -> None:
        """Solve one scope: its tensors, all measured."""

    @abstractmethod
    def combine(self, layer: LayerTable, rows: Sequence[int], out: OutputTable) -> Written:
        """Write the merged tensors of a layer, or pieces of them."""

    @abstractmethod
    def state(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return what was measured of these rows: arrays whose first dimension is the row, for ``restore``."""

    @abstractmethod
    def restore(self, rows: Sequence[int], state: dict[str, NDArray[Any]]) -> None:
        """Take the place of ``measure`` for these rows, with what ``state`` returned for them in another process."""

    def is_restorable(self, row: int) -> bool:
        """Return whether ``state`` has all that ``combine`` needs of a row; else it has to be measured again."""
        return True

    def is_unchanged(self, row: int) -> bool:
        """Return whether it is known that no model differs from the base in this tensor."""
        return False
