"""What launches of sparse kernels take besides the layer's table: csrc/cuda/sparse_table.h reads it.

Sections of columns behind the layer's table, each at a multiple of 8 bytes, its columns of 8 bytes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .launch_tables import Launch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tables import LayerElection, MaskTable

VARIANCE, IMPORTANCE = 1, 2
"""Kinds of keys: variance across models; magnitude times a row's factor."""

RANKED, BITS = 3, 5
"""Kinds of masks: random by rank, which is made before; and made before, a bit per element."""

UPPER_BITS, LOWER_BITS, EQUAL, NONZERO = range(4)
"""What ``count_keys`` counts: see csrc/cuda/layer_threshold.cuh."""
LOWER_KEY_BITS = 15
UPPER_BINS, LOWER_BINS = 1 << 16, 1 << LOWER_KEY_BITS

_ROUNDING_NBYTES = 8  # a section may begin so much later
_KEYS_NBYTES = 24


@dataclass(frozen=True)
class SectionedLaunch(Launch):
    """One call of a kernel that takes more than the layer's table.

    Attributes:
        key_kind: what elements are ranked by.
        factors: address and bytes of the device memory that the rows' factors are in, of keys by importance.
        sections: addresses of the sections, on the device: masks, and election or ranks; or the keys that are wanted;
            or the columns of matrices.
        num_keys, num_ranks: J and R, where keys are counted.
        num_rows, num_items: rows that are ranked, and their elements with each row padded to a power of two.
        num_sums: sums of columns, each of one column and one pair of operands.
    """

    key_kind: int = 0
    factors: tuple[int, int] = (0, 0)
    sections: tuple[int, ...] = ()
    num_keys: int = 0
    num_ranks: int = 0
    num_rows: int = 0
    num_items: int = 0
    num_sums: int = 0


def masks_nbytes(num_models: int) -> int:
    """Return the most bytes that masks take per piece."""
    return _ROUNDING_NBYTES + _KEYS_NBYTES + 65 * num_models


def election_nbytes(num_models: int) -> int:
    """Return the most bytes that an election takes per piece."""
    return _ROUNDING_NBYTES + 18 + 32 * num_models


def ranks_nbytes() -> int:
    """Return the most bytes that rows to rank take per piece."""
    return _ROUNDING_NBYTES + 24


def wanted_nbytes(num_wanted: int) -> int:
    """Return the most bytes that keys that are looked for take per piece."""
    return _ROUNDING_NBYTES + _KEYS_NBYTES + 4 * num_wanted


def keys_section(
    firsts: NDArray[np.int64], columns: NDArray[np.int64], factors: NDArray[np.uint64]
) -> NDArray[np.uint8]:
    """Return what pieces are ranked by, the beginning of sections of masks and of keys that are wanted.

    Args:
        firsts: int64 ``[P]``: the first element of each piece.
        columns: int64 ``[P]``: elements per row.
        factors: uint64 ``[P]``: where the factors of the tensor's rows are on the device.
    """
    return _bytes_of(firsts, columns, factors)


def masks_section(
    keys: NDArray[np.uint8],
    masks: MaskTable,
    tensors: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    bits: NDArray[np.uint64],
) -> NDArray[np.uint8]:
    """Return the masks of pieces.

    Args:
        keys: what the pieces are ranked by, from :func:`keys_section`.
        masks: of the layer's tensors.
        tensors: int64 ``[P]``: whose pieces they are.
        kinds: uint8 ``[P, T]``.
        bits: uint64 ``[P, T]``: where masks of kind BITS are on the device, and where those of RANKED go.
    """
    return _bytes_of(
        keys,
        masks.indices[tensors],
        masks.probabilities[tensors],
        masks.streams[tensors],
        masks.values[tensors],
        bits,
        masks.keys[tensors],
        kinds,
    )


def election_section(election: LayerElection, tensors: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return how pieces of these tensors are combined."""
    return _bytes_of(
        election.scales[tensors],
        election.votes[tensors],
        election.weights[tensors],
        election.uniques[tensors],
        election.lambdas[tensors],
        election.floors[tensors],
        election.elects[tensors],
        election.normalizes[tensors],
    )


def wanted_section(keys: NDArray[np.uint8], wanted: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the bits of keys that are looked for, uint32 ``[P, J, R]``, behind what the pieces are ranked by."""
    return _bytes_of(keys, wanted)


def ranks_section(num_rows: NDArray[np.int64], num_items: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return where the rows of pieces are sorted, from their numbers and those of their items, int64 ``[P]``."""
    return _bytes_of(np.concatenate([[0], np.cumsum(num_rows)]), np.cumsum(num_items) - num_items)


def columns_nbytes() -> int:
    """Return the most bytes that columns of matrices take per piece."""
    return _ROUNDING_NBYTES + 5 * 8 + 8 + 1


def columns_section(
    columns: NDArray[np.int64],
    firsts: NDArray[np.int64],
    starts: NDArray[np.int64],
    is_last: NDArray[np.bool_],
    num_pairs: int,
) -> NDArray[np.uint8]:
    """Return the matrices that pieces are of, by columns.

    Args:
        columns: int64 ``[P]``: elements per row.
        firsts: int64 ``[P]``: the first element of each piece.
        starts: int64 ``[P]``: columns of the layer before the piece's tensor.
        is_last: bool ``[P]``: whether the tensor ends with the piece.
        num_pairs: pairs of operands.
    """
    ends = np.cumsum(columns * num_pairs)
    return _bytes_of(columns, firsts, starts, np.concatenate([[0], ends]), is_last.astype(np.uint8))


def join(packed: NDArray[np.uint8], sections: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the layer's table with sections behind it, and where each begins."""
    starts, end = [], packed.nbytes
    for section in sections:
        starts.append(-(-end // 8) * 8)
        end = starts[-1] + section.nbytes
    together = np.zeros(end, np.uint8)
    for start, part in zip([0, *starts], [packed, *sections], strict=True):
        together[start : start + part.nbytes] = part
    return together, starts


def _bytes_of(*columns: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.concatenate([np.ascontiguousarray(column).reshape(-1).view(np.uint8) for column in columns])
