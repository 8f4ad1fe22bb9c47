"""A layer as the backends take it: tables of addresses, filled in one place.

The tables are those of :mod:`metagpt_fast._native`; shapes and dtypes are described there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY = -1
"""In ``files``: the address is one in memory, not an offset in a file."""

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


@dataclass(frozen=True)
class OutputTable:
    """Where K results go."""

    addresses: NDArray[np.uint64]  # [K]
    files: NDArray[np.int32]  # [K]
    dtypes: NDArray[np.uint8]  # [K]


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
