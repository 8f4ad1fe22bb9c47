"""A layer as the backends take it: tables of addresses, filled in one place.

The tables are those of :mod:`metagpt_fast._native`; shapes and dtypes are described there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..dtypes import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY = -1
"""In ``files``: the address is one in memory, not an offset in a file."""

_CODES = {dtype.code: dtype.itemsize for dtype in DTYPES.values() if dtype.code is not None}
ITEMSIZES = np.array([_CODES[code] for code in range(len(_CODES))], np.uint64)
"""Bytes per element, by dtype code."""

# One operand: address (or byte offset in the file), file descriptor or MEMORY, dtype code.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class LayerTable:
    """K tensors with V operands each."""

    addresses: NDArray[np.uint64]  # [K, V]
    files: NDArray[np.int32]  # [K, V]
    dtypes: NDArray[np.uint8]  # [K, V]
    numels: NDArray[np.int64]  # [K]
    has_base: bool

    @property
    def num_tensors(self) -> int:
        """Return K."""
        return int(self.addresses.shape[0])

    @property
    def num_operands(self) -> int:
        """Return V."""
        return int(self.addresses.shape[1])

    def take(self, tensors: Sequence[int]) -> LayerTable:
        """Return the table of some of the tensors."""
        return LayerTable(
            self.addresses[tensors], self.files[tensors], self.dtypes[tensors], self.numels[tensors], self.has_base
        )


@dataclass(frozen=True)
class OutputTable:
    """Where K results go."""

    addresses: NDArray[np.uint64]  # [K]
    files: NDArray[np.int32]  # [K]
    dtypes: NDArray[np.uint8]  # [K]

    def take(self, tensors: Sequence[int]) -> OutputTable:
        """Return the table of some of the results."""
        return OutputTable(self.addresses[tensors], self.files[tensors], self.dtypes[tensors])


@dataclass(frozen=True)
class MaskTable:
    """The masks of K tensors and T models (docs/numerics.md)."""

    key_kind: int
    kinds: NDArray[np.uint8]  # [K, T]
    keys: NDArray[np.uint32]  # [K, T, 2] upper, lower
    indices: NDArray[np.int64]  # [K, T, 2] upper, lower
    probabilities: NDArray[np.uint64]  # [K, T, 2] in units of 2^-32
    streams: NDArray[np.uint64]  # [K, T]
    values: NDArray[np.float64]  # [K, T]
    row_factors: NDArray[np.uint64]  # [K] address of float64 [R], 0 where unused
    columns: NDArray[np.int64]  # [K] elements per row


@dataclass(frozen=True)
class LayerElection:
    """How the models of K tensors are combined at each element (docs/numerics.md)."""

    scales: NDArray[np.float64]  # [K, T]
    votes: NDArray[np.float64]  # [K, T]
    weights: NDArray[np.float64]  # [K, T]
    uniques: NDArray[np.float64]  # [K, T]
    lambdas: NDArray[np.float64]  # [K]
    floors: NDArray[np.float64]  # [K]
    elects: NDArray[np.uint8]  # [K]
    normalizes: NDArray[np.uint8]  # [K]


def layer_table(places: Sequence[Sequence[Place]], numels: Sequence[int], has_base: bool) -> LayerTable:
    """Return the table of K tensors, each with V places ``(address, file, dtype code)``."""
    shape = (len(places), len(places[0]))
    flat = [place for row in places for place in row]
    addresses, files, dtypes = zip(*flat, strict=True)
    return LayerTable(
        np.array(addresses, np.uint64).reshape(shape),
        np.array(files, np.int32).reshape(shape),
        np.array(dtypes, np.uint8).reshape(shape),
        np.array(numels, np.int64),
        has_base,
    )


def output_table(places: Sequence[Place]) -> OutputTable:
    """Return the table of K results."""
    addresses, files, dtypes = zip(*places, strict=True)
    return OutputTable(np.array(addresses, np.uint64), np.array(files, np.int32), np.array(dtypes, np.uint8))


class Backend(Protocol):
    """What carries out the kernels' contract (docs/numerics.md)."""

    name: str

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """Add the Gram matrices to ``gram``, float64 ``[K, V, V]``, in place."""

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> NDArray[np.int64]:
        """Write the merged tensors; ``coefficients`` float64 ``[K, T]``. Return non-finite counts, int64 ``[K]``."""

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return per operand the number of NaN and Inf, and the index of the first (-1: none), int64 ``[K, V]``."""
