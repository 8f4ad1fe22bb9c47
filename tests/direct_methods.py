"""Merge methods on vectors, step by step in float64, as their definitions go: nothing of this is from the package."""

from __future__ import annotations

import numpy as np

from .arrays import FloatArray


def norm(vector: FloatArray) -> float:
    return float(np.sqrt(np.sum(vector**2)))


def slerp(t: float, a: FloatArray, b: FloatArray) -> FloatArray:
    """Great circle from a to b; a straight line where they are within 1.8 degrees of one line."""
    lengths = [norm(v) if norm(v) > 1e-8 else 1.0 for v in (a, b)]
    cosine = min(max(float(np.sum((a / lengths[0]) * (b / lengths[1]))), -1.0), 1.0)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(weights: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    cosine = float(np.sum((a / max(norm(a), 1e-7)) * (b / max(norm(b), 1e-7))))
    cosine = min(max(cosine, -1.0), 1.0)
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def multislerp(weights: FloatArray, vectors: FloatArray, *, normalize: bool = True, eps: float = 1e-8) -> FloatArray:
    """Normalized mean of the unit vectors, tangent vectors there, their mean, and the exponential map back."""
    if len(vectors) == 1:
        return vectors[0]
    if normalize:
        weights = weights / weights.sum()
    lengths = np.array([norm(v) for v in vectors])
    units = vectors / (lengths + eps)[:, None]
    mean = weights @ units
    if norm(mean) < eps:
        if len(vectors) == 2:
            return weights @ vectors
        raise ValueError("weighted sum of the directions is zero")
    mean = mean / norm(mean)
    tangents = units - (units @ mean)[:, None] * mean
    move = weights @ tangents
    arc = norm(move) + eps
    return (np.cos(arc) * mean + np.sin(arc) / arc * move) * (weights @ lengths)


def karcher(vectors: FloatArray, *, max_iter: int = 10, tol: float = 1e-5) -> FloatArray:
    """Log map, mean, exponential map, from the normalized mean of the directions on."""
    if len(vectors) == 1:
        return vectors[0]
    lengths = np.array([norm(v) for v in vectors])
    units = [v / length for v, length in zip(vectors, lengths, strict=True) if length > tol]
    if not units:
        return np.zeros_like(vectors[0])
    start = np.mean(units, axis=0)
    mean = units[0] if norm(start) < tol else start / norm(start)
    for _ in range(max_iter):
        move = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos(min(max(float(unit @ mean), -1.0), 1.0))
            if angle >= tol:
                move += angle / np.sin(angle) * (unit - (unit @ mean) * mean) / len(units)
        arc = norm(move)
        if arc < tol:
            break
        mean = np.cos(arc) * mean + np.sin(arc) * move / arc
        mean /= norm(mean)
    return lengths.mean() * mean


def model_stock(base: FloatArray, models: FloatArray) -> FloatArray:
    deltas = models - base
    count = len(models)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [deltas[i] @ deltas[j] / max(norm(deltas[i]) * norm(deltas[j]), 1e-6) for i, j in pairs]
    mean = float(np.mean(np.clip(cosines, -1, 1)))
    divisor = 1 + (count - 1) * mean
    t = 0.0 if abs(divisor) < 1e-6 else count * mean / divisor
    return t * models.mean(axis=0) + (1 - t) * base
