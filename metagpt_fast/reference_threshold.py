"""Thresholds in NumPy, by sorting. See :mod:`metagpt_fast.reference_masks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .reference import Operand
from .reference_masks import KeyRule, Keys, deltas, in_order, keys_of

NO_KEY = 0xFFFFFFFF


def threshold(operands: Sequence[Operand], rule: KeyRule, ranks: NDArray[np.int64]) -> tuple[Keys, NDArray[np.int64]]:
    """Return the elements of these ranks (0: the largest key; −1: none, answered by 2^32 − 1 and −1).

    Args:
        operands: base and T models.
        rule: what the elements are ranked by.
        ranks: int64 ``[J, R]``, J = 1 for VARIANCE, else T.

    Returns:
        uint32 ``[J, R]`` keys and int64 ``[J, R]`` indices.
    """
    found = np.full(ranks.shape, NO_KEY, np.uint32), np.full(ranks.shape, -1, np.int64)
    for j, keys in enumerate(keys_of(deltas(operands), rule)):
        order = in_order(keys)
        wanted = ranks[j] >= 0
        indices = order[ranks[j, wanted]]
        found[0][j, wanted] = keys[indices]
        found[1][j, wanted] = indices
    return found


def count_nonzero(operands: Sequence[Operand], rule: KeyRule) -> NDArray[np.int64]:
    """Return how many keys are above 0, int64 ``[J]``."""
    counts: NDArray[np.int64] = np.count_nonzero(keys_of(deltas(operands), rule), axis=1).astype(np.int64)
    return counts
