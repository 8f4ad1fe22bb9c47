"""Every merge method on one tensor in float64, from its formula: what kernels and other programs are judged by.

A function takes the base (None where there is none), the models, and the method's parameters by their names in recipes,
and returns a :class:`Merged`. Here are the methods that are linear combinations; those that select elements are in
``mask_oracles``. Formulas are those of the papers named in metagpt_fast/methods, in mergekit's reading of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# A comparison this close to equality, relatively, may come out either way in float32.
CLOSE = 1e-6


@dataclass(frozen=True)
class Merged:
    """A merged tensor.

    Attributes:
        result: float64, of the tensor's shape.
        largest: float64, the largest magnitude among the terms that were added up, the base among them.
        kept: bool ``[T, *shape]``, the elements of each task vector that were selected; None if nothing is selected.
        tied: elements whose rank is beside a threshold only by the order of equal keys. That order (lowest index first)
            is ours; another program may choose otherwise.
        doubtful: elements that rounding in float32 may decide otherwise: beside a threshold, or a sum near 0 whose sign
            is elected. All of the tensor where a decision is one for all of it.
    """

    result: FloatArray
    largest: FloatArray
    kept: BoolArray | None
    tied: BoolArray
    doubtful: BoolArray


def merged(terms: Sequence[FloatArray], *, is_doubtful: bool | BoolArray = False) -> Merged:
    """Return the sum of terms, nothing selected."""
    result = np.sum(terms, axis=0)
    shape = result.shape
    nothing = np.zeros(shape, bool)
    largest = np.max(np.abs(terms), axis=0)
    return Merged(result, largest, None, nothing, np.broadcast_to(np.asarray(is_doubtful), shape))


def is_close(value: float | FloatArray, threshold: float) -> BoolArray:
    """Return where a comparison with the threshold may come out either way in float32."""
    return np.asarray(np.abs(value - threshold) <= CLOSE * np.abs(threshold))


def per_model(value: float | Sequence[float], num_models: int) -> FloatArray:
    """Return one number per model, where one was given for all or one for each."""
    return np.array(np.broadcast_to(np.asarray(value, np.float64), (num_models,)))


def passthrough(base: FloatArray | None, models: Sequence[FloatArray], *, scale: float | None = None) -> Merged:
    """Return the only model, times ``scale``."""
    (model,) = models
    return merged([model if scale is None else model * scale])


def linear(
    base: FloatArray | None,
    models: Sequence[FloatArray],
    *,
    weight: float | Sequence[float],
    normalize: bool = True,
) -> Merged:
    """Return Σ w θ, divided by Σ w; a base counts only if it is among the models."""
    weights = per_model(weight, len(models))
    if normalize:
        weights = weights / math.fsum(weights)
    return merged([w * model for w, model in zip(weights, models, strict=True)])


def task_arithmetic(
    base: FloatArray,
    models: Sequence[FloatArray],
    *,
    weight: float | Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Merged:
    """Return θ₀ + λ Σ w τ, divided by Σ w if asked for and that is not nearly 0."""
    weights = per_model(weight, len(models))
    factor = lambda_ / divisor_of(weights, normalize)
    return merged([base, *(factor * w * (model - base) for w, model in zip(weights, models, strict=True))])


def divisor_of(weights: FloatArray, normalize: bool) -> float:
    """Return Σ w, or 1 if that is nearly 0 or not asked for."""
    total = math.fsum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def metagpt_shares(vectors: Sequence[FloatArray], exponent: float = 2.0) -> FloatArray:
    """Return ‖τ_t‖^p / Σ_k ‖τ_k‖^p (arXiv 2406.11385, Eq. 15), for task vectors that are not 0."""
    norms = np.array([norm(vector) for vector in vectors])
    powers = norms**exponent
    return powers / math.fsum(powers)


def metagpt(base: FloatArray, models: Sequence[FloatArray], *, exponent: float = 2.0) -> Merged:
    """Return θ₀ + Σ λ τ with λ from this tensor's norms."""
    return task_arithmetic(base, models, weight=list(metagpt_shares([model - base for model in models], exponent)))


def slerp(base: FloatArray, models: Sequence[FloatArray], *, t: float) -> Merged:
    """Return the base and one model interpolated on the sphere, on the line if |cos| > 0.9995."""
    (model,) = models
    lengths = [length if length > 1e-8 else 1.0 for length in (norm(base), norm(model))]
    cosine = min(max(inner(base / lengths[0], model / lengths[1]), -1.0), 1.0)
    is_doubtful = bool(is_close(abs(cosine), 0.9995))
    if abs(cosine) > 0.9995:
        return merged([(1 - t) * base, t * model], is_doubtful=is_doubtful)
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return merged([first * base, second * model], is_doubtful=is_doubtful)


def nuslerp(
    base: FloatArray | None,
    models: Sequence[FloatArray],
    *,
    weight: float | Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Merged:
    """Return two models, or their task vectors, interpolated on the sphere: whole, per row, or per column.

    A row is what the last dimension runs through; a column what the first one does.
    """
    weights = per_model(weight, 2)
    t = 0.5 if abs(math.fsum(weights)) < 1e-6 else float(weights[1] / math.fsum(weights))
    vectors = [model if base is None else model - base for model in models]
    axis = None if nuslerp_flatten or vectors[0].ndim == 0 else 0 if nuslerp_row_wise else -1
    first, second = vectors
    lengths = [np.maximum(np.sqrt(np.sum(v * v, axis=axis, keepdims=True)), 1e-7) for v in vectors]
    cosine = np.clip(np.sum((first / lengths[0]) * (second / lengths[1]), axis=axis, keepdims=True), -1, 1)
    is_on_line = 1 - cosine**2 <= 1e-16
    angle = np.arccos(np.where(is_on_line, 0, cosine))
    left = np.where(is_on_line, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    right = np.where(is_on_line, t, np.sin(t * angle) / np.sin(angle))
    # Between the line and the sphere the coefficients are continuous where cos = 1, but not where it is -1. Where the
    # vectors are single numbers, it is 1 or -1 without a doubt.
    is_single = first.size == cosine.size
    is_doubtful = np.broadcast_to((cosine < -1 + CLOSE) & (not is_single), first.shape)
    return merged([*([] if base is None else [base]), left * first, right * second], is_doubtful=is_doubtful)


def multislerp(
    base: FloatArray | None,
    models: Sequence[FloatArray],
    *,
    weight: float | Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Merged:
    """Return the weighted mean of the unit vectors, moved along its tangent, times Σ w ‖·‖.

    Of models, or of task vectors if there is a base. The tangent step is 0 but for rounding (Σ w u is along the mean
    already), and is computed all the same. One model is returned as it is.
    """
    if len(models) == 1:
        return merged([models[0]])
    start = [] if base is None else [base]
    weights = per_model(weight, len(models))
    if normalize_weights:
        weights = weights / math.fsum(weights)
    vectors = [model if base is None else model - base for model in models]
    lengths = np.array([norm(vector) for vector in vectors])
    units = [vector / (length + eps) for vector, length in zip(vectors, lengths, strict=True)]
    mean = weighted(weights, units)
    if norm(mean) < eps:
        if len(models) != 2:
            raise ValueError("the unit vectors cancel")
        return merged([*start, *(w * vector for w, vector in zip(weights, vectors, strict=True))])
    mean_length = norm(mean)
    mean = mean / mean_length
    tangent = weighted(weights, [unit - inner(unit, mean) * mean for unit in units])
    step = norm(tangent) + eps
    factor = math.fsum(weights * lengths)
    direction = mean * math.cos(step) + tangent * (math.sin(step) / step)
    outcome = merged([*start, factor * direction])
    # The mean is a sum of terms that may be far larger than it.
    terms = [factor * w / mean_length * unit for w, unit in zip(weights, units, strict=True)]
    largest = np.max(np.abs([outcome.largest, *terms]), axis=0)
    return Merged(outcome.result, largest, None, outcome.tied, outcome.doubtful)


def karcher(base: FloatArray | None, models: Sequence[FloatArray], *, max_iter: int = 10, tol: float = 1e-5) -> Merged:
    """Return the Riemannian mean of the unit vectors, by ``max_iter`` steps, times the mean norm.

    The base, if there is one, is one more model. Vectors shorter than ``tol`` count for the mean norm only.
    """
    vectors = [*([] if base is None else [base]), *models]
    if len(vectors) == 1:
        return merged(vectors)
    lengths = [norm(vector) for vector in vectors]
    units = [vector / length for vector, length in zip(vectors, lengths, strict=True) if length > tol]
    if not units:
        return merged([np.zeros_like(vectors[0])])
    is_doubtful = any(bool(is_close(length, tol)) for length in lengths)
    share = 1 / len(units)
    total = np.sum(units, axis=0) * share
    mean = units[0] if norm(total) < tol else total / norm(total)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = angle_between(mean, unit)
            if angle >= tol:
                tangent = tangent + share * angle / math.sin(angle) * (unit - inner(mean, unit) * mean)
        step = norm(tangent)
        is_doubtful |= abs(step - tol) <= 0.01 * tol
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / norm(mean)
    outcome = merged([math.fsum(lengths) / len(lengths) * mean], is_doubtful=is_doubtful)
    largest = np.max(np.abs([outcome.result, *(share * vector for vector in vectors)]), axis=0)
    return Merged(outcome.result, largest, None, outcome.tied, outcome.doubtful)


def model_stock(base: FloatArray, models: Sequence[FloatArray], *, filter_wise: bool = False) -> Merged:
    """Return t · mean θ + (1 − t) θ₀, t = N c / (1 + (N − 1) c), c the mean cosine of pairs of task vectors.

    Of the whole tensor, or of each row. A product of norms counts as 1e-6 at least; t is 0 where its divisor is.
    """
    axis = -1 if filter_wise and base.ndim > 0 else None
    deltas = [model - base for model in models]
    count = len(models)

    def product(a: FloatArray, b: FloatArray) -> FloatArray:
        return np.asarray(np.sum(a * b, axis=axis, keepdims=True), np.float64)

    cosines = [
        np.clip(
            product(a, b) / np.maximum(np.sqrt(product(a, a)) * np.sqrt(product(b, b)), 1e-6),
            -1,
            1,
        )
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (count - 1) * cosine
    is_singular = np.abs(divisor) < 1e-6
    t = np.where(is_singular, 0, count * cosine / np.where(is_singular, 1, divisor))
    # Beside the singularity t is the quotient of a rounding error.
    is_doubtful = np.broadcast_to(np.abs(divisor) < 1e-3, base.shape)
    return merged([base, *(t / count * delta for delta in deltas)], is_doubtful=is_doubtful)


def norm(vector: FloatArray) -> float:
    """Return ‖v‖ of a tensor of any shape."""
    return math.sqrt(inner(vector, vector))


def inner(a: FloatArray, b: FloatArray) -> float:
    """Return ⟨a, b⟩ of tensors of any shape."""
    return float(np.sum(a * b))


def angle_between(a: FloatArray, b: FloatArray) -> float:
    """Return the angle of two unit vectors, exact also where it is small: 2 atan2(‖a − b‖, ‖a + b‖)."""
    return 2 * math.atan2(norm(a - b), norm(a + b))


def weighted(weights: FloatArray, vectors: Sequence[FloatArray]) -> FloatArray:
    """Return Σ w v."""
    return np.asarray(np.sum([w * v for w, v in zip(weights, vectors, strict=True)], axis=0), np.float64)
