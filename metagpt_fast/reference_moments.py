"""Sums over masked task vectors in NumPy, in float64. See :mod:`metagpt_fast.reference_masks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .reference import FloatArray, Operand
from .reference_masks import KeyRule, MaskRule, deltas, masks_of


def moments(operands: Sequence[Operand], rules: Sequence[MaskRule], key_rule: KeyRule) -> FloatArray:
    """Return float64 ``[T, 6]``: elements kept, Σ|δ|, Σ|δ|m, Σδ², Σ(δm)², elements that only this model keeps.

    A dropped element (m = 0) adds nothing to the masked sums, also where it is NaN or Inf.
    """
    delta = deltas(operands)
    masks = masks_of(delta, rules, key_rule)
    kept = masks > 0
    alone = kept & (kept.sum(axis=0) == 1)
    with np.errstate(all="ignore"):
        magnitude = np.abs(delta.astype(np.float64))
        masked = np.where(kept, magnitude * masks, 0.0)
        columns = [
            kept.sum(axis=1),
            magnitude.sum(axis=1),
            masked.sum(axis=1),
            (magnitude**2).sum(axis=1),
            (masked**2).sum(axis=1),
            alone.sum(axis=1),
        ]
    return np.stack(columns, axis=1).astype(np.float64)
