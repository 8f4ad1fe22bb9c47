"""The masks of sparse methods in NumPy: what is kept of each task vector. The contract is in docs/numerics.md.

Nothing here shares code with the kernels: bands are intervals of one integer per element, ranks come from a sort, and
random numbers from Philox in 64-bit integers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
A tensor is a list of operands ``[base, model_1 ... model_T]`` as in :mod:`metagpt_fast.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import F64
from .reference import FloatArray, Operand, to_float64

MAGNITUDE, VARIANCE, IMPORTANCE = range(3)
ALL, BAND, RANDOM, RANKED, NEAR = range(5)
NAN_KEY = 0x7FC00000

Keys = NDArray[np.uint32]


@dataclass(frozen=True)
class KeyRule:
    """What the elements of a tensor are ranked by.

    Attributes:
        kind: MAGNITUDE, VARIANCE or IMPORTANCE.
        columns: elements per row.
        row_factors: float64 ``[numel / columns]``, for IMPORTANCE.
    """

    kind: int = MAGNITUDE
    columns: int = 1
    row_factors: FloatArray | None = None


@dataclass(frozen=True)
class MaskRule:
    """The mask of one model: the columns of :class:`~metagpt_fast.backends.tables.MaskTable`."""

    kind: int = ALL
    keys: tuple[int, int] = (0, 0)
    indices: tuple[int, int] = (0, 0)
    probabilities: tuple[int, int] = (0, 0)
    stream: int = 0
    value: float = 0.0


def deltas(operands: Sequence[Operand]) -> NDArray[Any]:
    """Return ``model − base``, ``[T, numel]``, in float32, or in float64 if an operand is F64."""
    scalar = np.float64 if any(dtype is F64 for _, dtype in operands) else np.float32
    with np.errstate(all="ignore"):
        base, *models = (to_float64(raw, dtype).astype(scalar) for raw, dtype in operands)
        return np.stack([model - base for model in models])


def keys_of(delta: NDArray[Any], rule: KeyRule) -> Keys:
    """Return the keys that elements are ranked by: uint32 ``[J, numel]``, J = 1 for VARIANCE, else T."""
    with np.errstate(all="ignore"):
        values = delta.astype(np.float64)
        if rule.kind == VARIANCE:
            # T² times the variance, from differences to the first model: exactly 0 where models agree.
            differences = values[1:] - values[0]
            total = _sum_in_order(differences)
            values = (len(values) * _sum_in_order(differences * differences) - total * total)[None]
        elif rule.kind == IMPORTANCE:
            assert rule.row_factors is not None
            values = np.abs(values) * np.repeat(rule.row_factors, rule.columns)
        singles = np.abs(values.astype(np.float32))
    return np.where(np.isnan(singles), np.uint32(NAN_KEY), singles.view(np.uint32))


def in_order(keys: Keys) -> NDArray[np.int64]:
    """Return the indices of all elements: larger keys first, among equal ones the lower index."""
    return np.lexsort((np.arange(keys.size), ~keys))


def philox4x32(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Return Philox4x32-10 of 32-bit words: ``[4, n]`` counters and a 64-bit key give ``[4, n]`` random words."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = counters.astype(np.uint64)
    for step in range(10):
        key_low = np.uint64((key + step * 0x9E3779B9) & 0xFFFFFFFF)
        key_high = np.uint64(((key >> 32) + step * 0xBB67AE85) & 0xFFFFFFFF)
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> half) ^ b ^ key_low, second & low, (first >> half) ^ d ^ key_high, first & low
    return np.stack([a, b, c, d])


def uniforms(stream: int, numel: int, first: int = 0) -> NDArray[np.uint64]:
    """Return the random 32-bit numbers of ``numel`` elements from ``first``, a multiple of 4, on."""
    number = np.arange(first // 4, first // 4 - (-numel // 4), dtype=np.uint64)
    zero = np.zeros_like(number)
    words = philox4x32(np.stack([number & np.uint64(0xFFFFFFFF), number >> np.uint64(32), zero, zero]), stream)
    in_order_of_elements: NDArray[np.uint64] = words.T.reshape(-1)[:numel]
    return in_order_of_elements


def masks_of(delta: NDArray[Any], rules: Sequence[MaskRule], key_rule: KeyRule, first: int = 0) -> FloatArray:
    """Return m, float64 ``[T, numel]``, between 0 (dropped) and 1.

    ``delta`` may be whole rows of a tensor: from element ``first``, a multiple of 4, on.
    """
    keys = keys_of(delta, key_rule)
    masks = np.ones(delta.shape)
    for t, rule in enumerate(rules):
        own_keys = keys[t if len(keys) > 1 else 0]
        if rule.kind == BAND:
            masks[t] = _is_in_band(own_keys, rule, first)
        elif rule.kind == RANDOM:
            masks[t] = uniforms(rule.stream, delta.shape[1], first) < np.uint64(rule.probabilities[0])
        elif rule.kind == RANKED:
            masks[t] = uniforms(rule.stream, delta.shape[1], first) < _probabilities(own_keys, rule, key_rule.columns)
        elif rule.kind == NEAR:
            with np.errstate(all="ignore"):
                magnitude = np.fmax(np.abs(delta[t].astype(np.float64)), 1e-6)
                masks[t] = np.minimum(np.maximum(rule.value / magnitude, 0.0), 1.0)
    return masks


def _is_in_band(keys: Keys, rule: MaskRule, first: int) -> NDArray[np.bool_]:
    """Return which elements lie between the rule's two places in the order, these included."""
    numel = keys.size

    def place(key: NDArray[np.int64] | int, index: NDArray[np.int64] | int) -> NDArray[np.int64]:
        descending = 0xFFFFFFFF - np.asarray(key, np.int64)
        places: NDArray[np.int64] = descending * (numel + 2) + np.clip(index, -1, numel)
        return places

    own = place(keys.astype(np.int64), np.arange(numel))
    upper, lower = (place(key, index - first) for key, index in zip(rule.keys, rule.indices, strict=True))
    between: NDArray[np.bool_] = (upper <= own) & (own <= lower)
    return between


def _probabilities(keys: Keys, rule: MaskRule, columns: int) -> NDArray[np.uint64]:
    """Return the probability of each element in units of 2^-32, at most 2^32 − 1: linear in the rank within the row."""
    low, high = (float(p) for p in rule.probabilities)
    by_rank = np.floor(low + (high - low) * (np.arange(columns) / max(columns - 1, 1))).astype(np.uint64)
    by_rank = np.minimum(by_rank, np.uint64(0xFFFFFFFF))
    result = np.empty(keys.size, np.uint64)
    for start in range(0, keys.size, columns):
        row = keys[start : start + columns]
        result[start + np.lexsort((np.arange(columns), row))] = by_rank
    return result


def _sum_in_order(values: FloatArray) -> FloatArray:
    """Return the sum over the first axis, one addition after the other."""
    total = np.zeros(values.shape[1])
    for row in values:
        total = total + row
    return total
