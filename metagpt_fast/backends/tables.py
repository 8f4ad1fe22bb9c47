"""A layer as the backends take it: tables of addresses, filled in one place.

The tables are those of :mod:`metagpt_fast._native`; shapes and dtypes are described there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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

    def take(self, tensors: Sequence[int] | NDArray[np.int64]) -> LayerTable:
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
class Written:
    """What has become of K results."""

    num_nonfinite: NDArray[np.int64]  # [K] elements that are NaN or Inf
    crcs: NDArray[np.uint32]  # [K] CRC32C of the bytes that went to a file; 0 for results in memory

    @classmethod
    def zeros(cls, num_tensors: int) -> Written:
        """Return one to be filled in."""
        return cls(np.zeros(num_tensors, np.int64), np.zeros(num_tensors, np.uint32))

    def put(self, tensors: Sequence[int], part: Written) -> None:
        """Fill in some of the results."""
        self.num_nonfinite[tensors] = part.num_nonfinite
        self.crcs[tensors] = part.crcs


@dataclass(frozen=True)
class MaskTable:
    """Which elements of T task vectors are kept, for K tensors. The rules are in docs/numerics.md.

    Attributes:
        key_kind: what elements are ranked by: 0 magnitude, 1 variance across models, 2 magnitude times a row's factor.
        kinds: 0 all, 1 band, 2 random, 3 random by rank, 4 near.
        keys: of a band: upper and lower end, bits of non-negative float32.
        indices: of a band: which of the elements with the end's key is the end.
        probabilities: of random masks, in units of 2^-32, up to 2^32: the first; by rank: of a row's smallest and
            largest key.
        streams: of random masks: the random numbers' key.
        values: of near: the largest change.
        row_factors: addresses of float64 ``[numel / columns]``, 0 where unused.
        columns: elements per row: of ranks and row factors.
        bits: addresses of room for one bit per element, uint64 ``[ceil(numel / 64)]``, or 0; not for kinds 0 and 4. A
            backend's ``layer_moments`` may write there what is kept, for its ``layer_elect`` to read.
    """

    key_kind: int
    kinds: NDArray[np.uint8]  # [K, T]
    keys: NDArray[np.uint32]  # [K, T, 2]
    indices: NDArray[np.int64]  # [K, T, 2]
    probabilities: NDArray[np.uint64]  # [K, T, 2]
    streams: NDArray[np.uint64]  # [K, T]
    values: NDArray[np.float64]  # [K, T]
    row_factors: NDArray[np.uint64]  # [K]
    columns: NDArray[np.int64]  # [K]
    bits: NDArray[np.uint64]  # [K, T]

    def take(self, tensors: Sequence[int] | NDArray[np.int64]) -> MaskTable:
        """Return the masks of some of the tensors."""
        columns = {name: column[tensors] for name, column in vars(self).items() if name != "key_kind"}
        return MaskTable(self.key_kind, **columns)


@dataclass(frozen=True)
class LayerElection:
    """How the models are combined at each element of K tensors. The rules are in docs/numerics.md."""

    scales: NDArray[np.float64]  # [K, T] factors of masked task vectors
    votes: NDArray[np.float64]  # [K, T] factors where the sign is elected
    weights: NDArray[np.float64]  # [K, T] what the divisor adds up
    uniques: NDArray[np.float64]  # [K, T] factor where one model alone counts
    lambdas: NDArray[np.float64]  # [K] factor of all
    floors: NDArray[np.float64]  # [K] least divisor, where positive
    elects: NDArray[np.uint8]  # [K] whether only the majority's sign counts
    normalizes: NDArray[np.uint8]  # [K] whether the sum is divided by the weights


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


def rows_of(layer: LayerTable, columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of rows of each tensor, int64 ``[K]``; 0 where there are no elements.

    Raises:
        ValueError: ``columns`` does not divide the number of elements.
    """
    divisors = np.maximum(columns, 1)
    wrong = np.flatnonzero((layer.numels > 0) & ((columns < 1) | (layer.numels % divisors != 0)))
    if wrong.size:
        k = int(wrong[0])
        raise ValueError(f"columns: got {columns[k]} for a tensor of {layer.numels[k]} elements, expected a divisor")
    return layer.numels // divisors


def add_grams(
    grams: Sequence[NDArray[np.float64]], totals: Sequence[NDArray[np.float64]] | None
) -> list[NDArray[np.float64]]:
    """Return K arrays of Gram matrices, added to ``totals`` in place if there are such."""
    if totals is None:
        return list(grams)
    return [np.add(total, added, out=total) for total, added in zip(totals, grams, strict=True)]


def addresses_of(arrays: Sequence[NDArray[np.float64]], shapes: Sequence[tuple[int, ...]]) -> NDArray[np.uint64]:
    """Return where K arrays lie; the kernels see nothing but their addresses.

    Raises:
        ValueError: one is not C-contiguous float64 of its shape.
    """
    for array, shape in zip(arrays, shapes, strict=True):
        if array.dtype != np.float64 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"got {array.dtype} {array.shape}, expected C-contiguous float64 {shape}")
    return np.array([array.ctypes.data for array in arrays], np.uint64)


class Backend(Protocol):
    """What carries out the kernels' contract (docs/numerics.md)."""

    name: str

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """Add the Gram matrices to ``gram``, float64 ``[K, V, V]``, in place."""

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """Write the merged tensors; ``coefficients`` float64 ``[K, T]``."""

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return per operand the number of NaN and Inf, and the index of the first (-1: none), int64 ``[K, V]``."""

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """Return how far every row of a model is from the base's, the measure of Arcee Fusion.

        ``Σ p log(p / q)`` with ``p = softmax(model row) + 1e-8`` and ``q = softmax(base row) + 1e-8``. The layer has
        two operands, base and model; ``columns`` int64 ``[K]`` is the size of each tensor's last dimension.

        Returns:
            K arrays, float64 ``[numel / columns]``. NaN where a row of one of the two has a NaN or a +Inf.

        Raises:
            ValueError: ``columns`` does not divide numel, or the layer has no base or several models.
        """

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """Return the Gram matrix of every column of tensors seen as ``[R, C]``, C from ``columns`` int64 ``[K]``.

        ``gram``: K arrays float64 ``[C, V, V]`` to add to, in place, instead of zeros. A tensor given in pieces of
        multiples of 256 rows, in ascending order, gives the bits of the whole.

        Returns:
            K arrays, float64 ``[C, V, V]``.

        Raises:
            ValueError: ``columns`` does not divide numel.
        """

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """Write the merged tensors with coefficients per column, K arrays float64 ``[C, T]``.

        Raises:
            ValueError: ``columns`` does not divide numel, or the coefficients have another shape.
        """

    def layer_threshold(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
        ranks: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return keys and indices of the elements of these ranks, ``[K, J, R]``; 0 is the largest key, −1 none.

        J is 1 for ``key_kind`` 1, else T. See :class:`MaskTable` for the other arguments.
        """

    def layer_count_nonzero(
        self, layer: LayerTable, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
    ) -> NDArray[np.int64]:
        """Return how many keys are above 0, int64 ``[K, J]``."""

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """Return kept, Σ|δ|, Σ|δ|m, Σδ², Σ(δm)², and what only this model keeps: float64 ``[K, T, 6]``."""

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """Write ``base + λ Σ scale δ m / Σ weight`` over the models that count."""


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose addresses are in one GPU's memory. These methods use its current stream and wait for nothing."""

    def gram_on_device(self, layer: LayerTable) -> Any:
        """Return the Gram matrices, a tensor float64 ``[K, V, V]`` on the device."""

    def share_on_device(self, layer: LayerTable, gram: Any, scopes: Sequence[Sequence[int]], exponent: float) -> Any:
        """Return ``‖τ_t‖^p / Σ_k ‖τ_k‖^p`` of each tensor's scope, a tensor float64 ``[K, T]`` on the device.

        ``scopes``: the tensors of each; ``exponent``: p. 0 where no model changed anything.
        """

    def merge_on_device(
        self, layer: LayerTable, coefficients: Any, out: OutputTable, unchanged_by: Any | None = None
    ) -> Any:
        """Write the merged tensors. Return how many NaN and Inf were written, a tensor int64 ``[K]`` on the device.

        Args:
            layer: K tensors on the device.
            coefficients: float64 ``[K, T]`` or ``[T]``, numbers or a tensor.
            out: where the results go.
            unchanged_by: Gram matrices on the device: tensors that no model changed, by these, keep the base's bits
                where the output has the base's dtype.
        """
