"""The election of sparse methods in NumPy, to the bit. See :mod:`metagpt_fast.reference_masks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .dtypes import DType
from .reference import FloatArray, Operand, Raw, round_from_float64, to_float64
from .reference_masks import KeyRule, MaskRule, deltas, masks_of

_CHUNK_NUMEL = 1 << 20


@dataclass(frozen=True)
class Election:
    """How one tensor's models are combined: a row of :class:`~metagpt_fast.backends.tables.LayerElection`."""

    scales: FloatArray
    votes: FloatArray
    weights: FloatArray
    uniques: FloatArray
    factor: float
    floor: float
    elects: bool
    normalizes: bool


def elect(
    operands: Sequence[Operand],
    rules: Sequence[MaskRule],
    key_rule: KeyRule,
    election: Election,
    out_dtype: DType,
) -> Raw:
    """Return the merged tensor's bytes, the same as every backend's (NaN payloads apart).

        out = base + factor · num / den,  num = Σ (scale δ) m,  den = Σ weight      over the models that count

    Every operation is rounded to float64; factor · num / den is then rounded to float32 and added to the base in
    float32, unless an operand is F64. Where it is 0 the base stays as it is. Memory beyond the result is bounded,
    unless a row is very long.
    """
    raw, dtype = operands[0]
    numel = raw.size // dtype.itemsize
    # Whole rows, for the ranks within them; and four of them, because random numbers come in fours.
    four_rows = 4 * max(key_rule.columns, 1)
    step = max(1, _CHUNK_NUMEL // four_rows) * four_rows
    pieces = [np.empty(0, np.uint8)]
    for first in range(0, numel, step):
        end = min(first + step, numel)
        part = [(raw[first * dtype.itemsize : end * dtype.itemsize], dtype) for raw, dtype in operands]
        rule = key_rule
        if key_rule.row_factors is not None:
            factors = key_rule.row_factors[first // key_rule.columns : end // key_rule.columns]
            rule = replace(key_rule, row_factors=factors)
        pieces.append(_elect_rows(part, rules, rule, election, out_dtype, first))
    return np.concatenate(pieces)


def _elect_rows(
    operands: Sequence[Operand],
    rules: Sequence[MaskRule],
    key_rule: KeyRule,
    election: Election,
    out_dtype: DType,
    first: int,
) -> Raw:
    delta = deltas(operands)
    masks = masks_of(delta, rules, key_rule, first)
    kept = masks > 0
    with np.errstate(all="ignore"):
        values = delta.astype(np.float64)
        terms = np.where(kept, election.scales[:, None] * values * masks, 0.0)
        if election.elects:
            votes = _sum_in_order(np.where(kept, election.votes[:, None] * values * masks, 0.0))
            counts = np.where(votes >= 0, terms > 0, terms < 0) | np.isnan(terms)
        else:
            counts = kept
        total = _sum_in_order(np.where(counts, terms, 0.0))
        divisor = np.ones_like(total)
        if election.normalizes:
            divisor = _sum_in_order(np.where(counts, election.weights[:, None], 0.0))
            divisor[divisor == 0] = 1.0
        if election.floor > 0:
            divisor = np.maximum(divisor, election.floor)
        alone = counts & (counts.sum(axis=0) == 1)
        for own, unique in zip(alone, election.uniques, strict=True):
            total = np.where(own, total * unique, total)
        base = to_float64(*operands[0]).astype(delta.dtype)
        change = (election.factor * (total / divisor)).astype(delta.dtype)
        merged = np.where(change == 0, base, base + change)
        return round_from_float64(merged.astype(np.float64), out_dtype)


def _sum_in_order(rows: FloatArray) -> FloatArray:
    total = np.zeros(rows.shape[1])
    for row in rows:
        total = total + row
    return total
