"""The methods that select elements, on one tensor in float64; see ``method_oracles`` for the form.

Magnitudes are compared as float32 of |θ_t − θ₀|: the largest first, among equals the lowest index first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .method_oracles import CLOSE, BoolArray, FloatArray, Merged, divisor_of, is_close, metagpt_shares, per_model

Weights = float | Sequence[float] | str


@dataclass(frozen=True)
class Selection:
    """Which elements of a tensor are kept, and where that hangs by a hair; bool, see :class:`Merged`."""

    kept: BoolArray
    tied: BoolArray
    doubtful: BoolArray


def keep_ranks(keys: FloatArray, first: int, count: int) -> Selection:
    """Keep ``count`` elements from rank ``first`` on, rank 0 being the largest key."""
    flat = np.abs(keys).astype(np.float32).reshape(-1)
    order = np.lexsort((np.arange(flat.size), -flat.astype(np.float64)))
    kept, tied, doubtful = (np.zeros(flat.size, bool) for _ in range(3))
    kept[order[first : first + count]] = True
    for border in (first, first + count):  # between rank border - 1 and rank border
        if 0 < border < flat.size and count:
            above, below = flat[order[border - 1]], flat[order[border]]
            if above == below:
                tied |= flat == above
            for key in (above, below):
                doubtful |= is_close(flat.astype(np.float64), float(key)) & (flat != key)
            if above != below and is_close(float(above), float(below)):
                doubtful |= (flat == above) | (flat == below)
    return Selection(kept.reshape(keys.shape), tied.reshape(keys.shape), doubtful.reshape(keys.shape))


def keep_at_least(keys: FloatArray, threshold: float, *, or_equal: bool) -> Selection:
    """Keep elements with a key above the threshold, or equal to it."""
    kept = keys >= threshold if or_equal else keys > threshold
    return Selection(kept, np.zeros(keys.shape, bool), is_close(keys, threshold) & (keys != 0))


def combine(
    base: FloatArray,
    deltas: Sequence[FloatArray],
    selections: Sequence[Selection],
    *,
    scales: FloatArray,
    weights: FloatArray,
    votes: FloatArray | None = None,
    elects: bool = False,
    normalizes: bool = False,
    factor: float = 1.0,
    floor: float = 0.0,
) -> Merged:
    """Return θ₀ + factor · Σ scale δ / Σ weight over the models that keep an element and, if ``elects``, agree in sign.

    The elected sign is that of Σ vote δ over the kept (+ for 0), vote = scale if not given. The divisor is 1 where it
    would be 0, and at least ``floor`` where that is positive.
    """
    kept = np.array([selection.kept for selection in selections])
    tied = np.any([selection.tied for selection in selections], axis=0)
    doubtful = np.any([selection.doubtful for selection in selections], axis=0)
    terms = np.array([s * delta for s, delta in zip(scales, deltas, strict=True)]) * kept
    counts = kept
    if elects:
        ballots = terms if votes is None else np.array([v * d for v, d in zip(votes, deltas, strict=True)]) * kept
        ballot, size = ballots.sum(axis=0), np.abs(ballots).sum(axis=0)
        doubtful = doubtful | ((np.abs(ballot) <= CLOSE * size) & (np.count_nonzero(ballots, axis=0) > 1))
        sign = np.where(ballot >= 0, 1.0, -1.0)
        counts = np.sign(terms) == sign
    divisor: FloatArray | float = 1.0
    if normalizes:
        by_model = weights.reshape(-1, *[1] * base.ndim)
        divisor = (by_model * counts).sum(axis=0)
        # Weights of both signs that cancel: the divisor is a rounding error.
        doubtful = doubtful | (
            (np.abs(divisor) <= CLOSE * (np.abs(by_model) * counts).sum(axis=0)) & counts.any(axis=0)
        )
        divisor = np.where(divisor == 0, 1.0, divisor)
        if floor > 0:
            divisor = np.maximum(divisor, floor)
    terms = factor * terms * counts / divisor
    result = base + terms.sum(axis=0)
    return Merged(result, np.max(np.abs([base, *terms]), axis=0), kept, tied, doubtful)


def rescaling(delta: FloatArray, kept: BoolArray) -> float:
    """Return Σ|δ| / Σ|δ| over the kept: the factor that gives the L1 norm back; 1 where a sum is nearly 0."""
    before, after = math.fsum(np.abs(delta).reshape(-1)), math.fsum(np.abs(delta[kept]))
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def pruned(
    base: FloatArray,
    models: Sequence[FloatArray],
    selections: Sequence[Selection],
    *,
    weight: Weights,
    elects: bool,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Merged:
    """Return task arithmetic on pruned task vectors; ``weight`` may be "metagpt", from the vectors that are merged."""
    deltas = [model - base for model in models]
    factors = np.array([rescaling(d, s.kept) if rescale else 1.0 for d, s in zip(deltas, selections, strict=True)])
    if weight == "metagpt":
        weights = metagpt_shares([f * d * s.kept for f, d, s in zip(factors, deltas, selections, strict=True)])
    else:
        assert not isinstance(weight, str)
        weights = per_model(weight, len(models))
    return combine(
        base,
        deltas,
        selections,
        scales=weights * factors,
        weights=weights,
        elects=elects,
        normalizes=elects and normalize,
        factor=lambda_ / (1.0 if elects else divisor_of(weights, normalize)),
    )


def ties(
    base: FloatArray,
    models: Sequence[FloatArray],
    *,
    weight: Weights,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Merged:
    """Keep the max(1, int(density · n)) largest magnitudes, elect signs, average what agrees (arXiv 2306.01708)."""
    selections = []
    for model, share in zip(models, per_model(density, len(models)), strict=True):
        count = base.size if share >= 1 else 0 if share <= 0 else max(1, int(share * base.size))
        selections.append(keep_ranks(model - base, 0, count))
    return pruned(
        base, models, selections, weight=weight, elects=True, normalize=normalize, rescale=rescale, lambda_=lambda_
    )


def breadcrumbs(
    base: FloatArray,
    models: Sequence[FloatArray],
    *,
    weight: Weights,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    elects: bool = False,
) -> Merged:
    """Drop the int(gamma · n) largest magnitudes, then the smallest until int(density · n) remain (arXiv 2312.06795).

    Fewer of the largest are dropped if too few would remain.
    """
    num_models = len(models)
    selections = []
    for model, share, top in zip(models, per_model(density, num_models), per_model(gamma, num_models), strict=True):
        first, count = 0, base.size
        if share < 1:
            count = int(share * base.size)
            first = min(int(top * base.size), base.size - count)
        selections.append(keep_ranks(model - base, first, count))
    return pruned(
        base, models, selections, weight=weight, elects=elects, normalize=normalize, rescale=rescale, lambda_=lambda_
    )


def breadcrumbs_ties(base: FloatArray, models: Sequence[FloatArray], **parameters: object) -> Merged:
    """Breadcrumbs' pruning, then an election of signs."""
    return breadcrumbs(base, models, elects=True, **parameters)  # type: ignore[arg-type]


def given(masks: Sequence[BoolArray]) -> list[Selection]:
    """Return selections that somebody else has made."""
    return [Selection(np.asarray(mask, bool), *(np.zeros(np.shape(mask), bool),) * 2) for mask in masks]


def dare_linear(
    base: FloatArray,
    models: Sequence[FloatArray],
    *,
    masks: Sequence[BoolArray],
    weight: Weights,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    elects: bool = False,
) -> Merged:
    """Keep what the masks say, give each task vector its L1 norm back, add up (arXiv 2311.03099)."""
    return pruned(
        base, models, given(masks), weight=weight, elects=elects, normalize=normalize, rescale=rescale, lambda_=lambda_
    )


def dare_ties(base: FloatArray, models: Sequence[FloatArray], **parameters: object) -> Merged:
    """DARE's pruning, then an election of signs."""
    return dare_linear(base, models, elects=True, **parameters)  # type: ignore[arg-type]


def della_linear(base: FloatArray, models: Sequence[FloatArray], **parameters: object) -> Merged:
    """As DARE; the masks are drawn with :func:`della_probabilities` (arXiv 2406.11617)."""
    return dare_linear(base, models, **parameters)  # type: ignore[arg-type]


def della(base: FloatArray, models: Sequence[FloatArray], **parameters: object) -> Merged:
    """DELLA's pruning, then an election of signs and the average."""
    return dare_linear(base, models, **{"elects": True, "normalize": True, **parameters})  # type: ignore[arg-type]


def della_probabilities(delta: FloatArray, density: float, epsilon: float) -> FloatArray:
    """Return for each element the probability to be kept: linear in the rank of its magnitude in its row.

    density − epsilon for the smallest, density + epsilon for the largest; among equals the lowest index is the smaller.
    """
    rows = np.abs(delta).astype(np.float32).reshape(-1, delta.shape[-1])
    ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    return (density - epsilon + 2 * epsilon * ranks / max(rows.shape[1] - 1, 1)).reshape(delta.shape)


def sce(base: FloatArray, models: Sequence[FloatArray], *, select_topk: float = 1.0) -> Merged:
    """Keep the int(select_topk · n) of the n nonzero variances across models, weigh by squared norm (arXiv 2408.07990).

    Minority signs by the unweighted sum are erased; the divisor is 1e-6 at least. mergekit takes equal weights where
    the mean squares sum to less than 1e-6; here the ratio is the true one.
    """
    deltas = np.array([model - base for model in models])
    selection = keep_ranks(base, 0, base.size if select_topk >= 1 else 0)
    if 0 < select_topk < 1:
        variance = deltas.var(axis=0)
        selection = keep_ranks(variance, 0, int(select_topk * np.count_nonzero(variance)))
    squares = np.array([math.fsum(delta[selection.kept] ** 2) for delta in deltas])
    total = math.fsum(squares)
    weights = squares / total if total > 0 else np.full(len(models), 1 / len(models))
    return combine(
        base,
        list(deltas),
        [selection] * len(models),
        scales=weights,
        weights=weights,
        votes=np.ones(len(models)),
        elects=True,
        normalizes=True,
        floor=1e-6,
    )


def nearswap(base: FloatArray, models: Sequence[FloatArray], *, t: float) -> Merged:
    """Return w θ + (1 − w) θ₀, w = t / max(|τ|, 1e-6) within 0 and 1."""
    (model,) = models
    w = np.clip(t / np.maximum(np.abs(model - base), 1e-6), 0, 1)
    nothing = np.zeros(base.shape, bool)
    largest = np.maximum(np.abs(w * model), np.abs((1 - w) * base))
    return Merged(w * model + (1 - w) * base, largest, None, nothing, nothing)


def arcee_fusion(base: FloatArray, models: Sequence[FloatArray]) -> Merged:
    """Keep δ where |δ| · KL(softmax(row θ) ‖ softmax(row θ₀)) ≥ median + 1.5 · (q3 − q1), quantiles exact.

    A quantile is the element int(q · (n − 1)) of the sorted importances. mergekit draws a sample for them where the
    tensor is large.
    """
    (model,) = models
    delta = model - base
    importance = np.abs(delta) * row_divergence(base, model)
    order = np.sort(importance.reshape(-1))
    lower, median, upper = (float(order[int(q * (order.size - 1))]) for q in (0.25, 0.5, 0.75))
    selection = keep_at_least(importance, median + 1.5 * (upper - lower), or_equal=True)
    return combine(base, [delta], [selection], scales=np.ones(1), weights=np.ones(1))


def row_divergence(base: FloatArray, model: FloatArray) -> FloatArray:
    """Return Σ p log(p / q) of each row, kept as a dimension of size 1; 1e-8 is added to both softmaxes.

    In extended precision: the terms are of the order of δ, what remains of their sum of the order of δ².
    """

    def softmax(values: FloatArray) -> NDArray[np.longdouble]:
        wide = values.astype(np.longdouble)
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True)) + np.longdouble(1e-8)

    p, q = softmax(model), softmax(base)
    return np.asarray((p * np.log(p / q)).sum(axis=-1, keepdims=True), np.float64)


def ram(base: FloatArray, models: Sequence[FloatArray], *, epsilon: float = 1e-5) -> Merged:
    """Return θ₀ plus the mean of δ over the models with |δ| > epsilon (arXiv 2601.13572)."""
    return ramplus_tl(base, models, epsilon=epsilon, r=0.0)


def ramplus_tl(
    base: FloatArray, models: Sequence[FloatArray], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Merged:
    """As RAM; where one model alone has changed, times 1 + r · clamp(shared / unique, 0, alpha) of that model."""
    deltas = [model - base for model in models]
    selections = [keep_at_least(np.abs(delta), epsilon, or_equal=False) for delta in deltas]
    kept = np.array([selection.kept for selection in selections])
    count = kept.sum(axis=0)
    unique = (kept & (count == 1)).reshape(len(models), -1).sum(axis=1)
    shared = (kept & (count > 1)).reshape(len(models), -1).sum(axis=1)
    factors = 1 + r * np.clip(shared / np.maximum(unique, epsilon), 0, alpha)
    alone = np.where(count == 1, (kept * factors.reshape(-1, *[1] * base.ndim)).sum(axis=0), 1.0)
    ones = np.ones(len(models))
    scaled = [delta * alone for delta in deltas]
    return combine(base, scaled, selections, scales=ones, weights=ones, normalizes=True)
