"""What elements are ranked by, on a device: a rule for all of a layer, and the rows' factors that importance needs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import sparse_tables
from .device_results import DeviceResults
from .sparse_tables import IMPORTANCE
from .tables import ITEMSIZES, LayerTable, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .slices import Slice
    from .streaming import Pipeline
    from .tables import MaskTable


@dataclass(frozen=True)
class KeyRule:
    """What the elements of K tensors are ranked by.

    Attributes:
        kind: 0 magnitude, 1 variance across models, 2 magnitude times a row's factor.
        columns: int64 ``[K]``: elements per row.
        row_factors: uint64 ``[K]``: addresses in host memory of float64 ``[numel / columns]``; of kind 2.
    """

    kind: int
    columns: NDArray[np.int64]
    row_factors: NDArray[np.uint64]

    @classmethod
    def of(cls, masks: MaskTable) -> KeyRule:
        """Return what masks rank by."""
        return cls(masks.key_kind, masks.columns, masks.row_factors)

    @property
    def arguments(self) -> tuple[NDArray[np.int64], NDArray[np.uint64], int]:
        """Return what kernels on the CPU take."""
        return self.columns, self.row_factors, self.kind

    def take(self, tensors: NDArray[np.int64]) -> KeyRule:
        """Return the rule of some of the tensors."""
        return KeyRule(self.kind, self.columns[tensors], self.row_factors[tensors])

    def of_pieces(self, layer: LayerTable, pieces: Sequence[tuple[int, int]], numel: int) -> PieceRule:
        """Return the rule of pieces of ``numel`` elements, given by tensor and number, as tensors of their own.

        A piece begins and ends within rows, so its elements are rows of their own.
        """
        tensors, numbers = (np.array(column, np.int64) for column in zip(*pieces, strict=True))
        firsts = numbers * numel
        numels = np.minimum(layer.numels[tensors] - firsts, numel)
        factors = []
        for k, first, count in zip(tensors.tolist(), firsts.tolist(), numels.tolist(), strict=True):
            if self.kind == IMPORTANCE:
                rows = np.arange(first, first + count) // self.columns[k]
                factors.append(self._factors(layer, k)[rows])
        addresses = [each.ctypes.data for each in factors] or [0] * len(pieces)
        dtypes = layer.dtypes[tensors]
        starts = layer.addresses[tensors] + firsts[:, None].astype(np.uint64) * ITEMSIZES[dtypes]
        table = LayerTable(starts, layer.files[tensors], dtypes, numels, layer.has_base)
        rule = KeyRule(self.kind, np.ones(len(pieces), np.int64), np.array(addresses, np.uint64))
        return PieceRule(table, rule, factors)

    def factors(self, layer: LayerTable) -> list[NDArray[np.float64]]:
        """Return the rows' factors of every tensor; of kind 2."""
        rows_of(layer, self.columns)  # raises for columns that are none
        return [self._factors(layer, k) for k in range(layer.num_tensors)]

    def _factors(self, layer: LayerTable, k: int) -> NDArray[np.float64]:
        num_rows = int(layer.numels[k]) // max(int(self.columns[k]), 1)
        if num_rows == 0:
            return np.zeros(0)
        memory = (ctypes.c_double * num_rows).from_address(int(self.row_factors[k]))
        return np.frombuffer(memoryview(memory), np.float64)


@dataclass(frozen=True)
class PieceRule:
    """Pieces of tensors, what they are ranked by, and the memory that the rule points to."""

    layer: LayerTable
    rule: KeyRule
    factors: list[NDArray[np.float64]]


@dataclass(frozen=True)
class DeviceKeys:
    """A rule whose factors are on the device.

    Attributes:
        rule: for K tensors.
        factors: uint64 ``[K]``: where the factors are, on the device.
        memory: address and bytes of all of them.
    """

    rule: KeyRule
    factors: NDArray[np.uint64]
    memory: tuple[int, int]

    def section(self, part: Slice) -> NDArray[np.uint8]:
        """Return what a launch takes of the rule for a slice."""
        tensors = part.tensors
        return sparse_tables.keys_section(part.firsts, self.rule.columns[tensors], self.factors[tensors])


class KeyStream:
    """The way of factors to a device: 8 bytes per row of all tensors of a layer, in memory of their own.

    Args:
        pipeline: whose kernels read them.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._room = DeviceResults(pipeline.device, pipeline)

    def load(self, layer: LayerTable, rule: KeyRule) -> DeviceKeys:
        """Bring the factors of a rule to the device, if it has any, instead of those that are there."""
        if rule.kind != IMPORTANCE:
            return DeviceKeys(rule, np.zeros(layer.num_tensors, np.uint64), (0, 0))
        factors = rule.factors(layer)
        sizes = np.array([each.nbytes for each in factors], np.int64)
        together = np.concatenate([*factors, np.zeros(1)])  # never without a byte
        address = self._room.load(together)
        starts = address + np.cumsum(sizes) - sizes
        return DeviceKeys(rule, starts.astype(np.uint64), (address, together.nbytes))
