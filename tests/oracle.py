"""The method in float64, written from the paper and from nothing in the package: λ, the merge, and roundings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from metagpt_fast.dtypes import BF16, F16, F32, F64, DType

from .arrays import FloatArray
from .checkpoints import Tensor

# Significant bits, and the exponent of the smallest normal number.
_FORMATS = {F32: (24, -126), F16: (11, -14), BF16: (8, -126), F64: (53, -1022)}

States = Sequence[Mapping[str, Tensor]]


def ulp(values: FloatArray, dtype: DType) -> FloatArray:
    """Return the distance between neighbouring numbers of ``dtype`` at these values."""
    num_bits, min_exponent = _FORMATS[dtype]
    exponents = np.maximum(np.frexp(values)[1] - 1, min_exponent)
    return np.ldexp(1.0, exponents - (num_bits - 1))


def rounded(values: FloatArray, dtype: DType) -> FloatArray:
    """Return the nearest numbers of ``dtype``, ties to even; for values within its range."""
    unit = ulp(values, dtype)
    return np.rint(values / unit) * unit


def task_vectors(states: States, names: Sequence[str]) -> list[FloatArray]:
    """Return τ_t over these tensors, one long vector per model."""
    return [
        np.concatenate([np.zeros(0), *(model[name].values - states[0][name].values for name in names)])
        for model in states[1:]
    ]


def scope_of(name: str, granularity: str) -> str:
    """Return what a tensor's coefficients are shared with."""
    if granularity == "model":
        return "model"
    parts = name.split(".")
    if granularity == "layer" and "layers" in parts:
        return ".".join(parts[: parts.index("layers") + 2])
    return name


def scopes(names: Sequence[str], granularity: str) -> dict[str, list[str]]:
    """Return the tensors of each scope."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(scope_of(name, granularity), []).append(name)
    return found


def coefficients(states: States, names: Sequence[str], exponent: float) -> FloatArray:
    """Return λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p over these tensors; 0 where no model changed them."""
    norms = np.array([np.sqrt(np.dot(vector, vector)) for vector in task_vectors(states, names)])
    if not norms.any():
        return np.zeros_like(norms)
    powers = norms**exponent
    return powers / powers.sum()


def combined(states: States, name: str, weights: FloatArray, *, uses_base: bool = True) -> FloatArray:
    """Return θ₀ + Σ_t λ_t (θ_t − θ₀), or Σ_t w_t θ_t, in float64."""
    if not uses_base:
        return sum(w * model[name].values for w, model in zip(weights, states[1:], strict=True))
    base = states[0][name].values
    return base + sum(w * (model[name].values - base) for w, model in zip(weights, states[1:], strict=True))


def magnitude(states: States, name: str) -> FloatArray:
    """Return the largest operand per element: what errors of fp32 arithmetic are relative to."""
    return np.max([np.abs(state[name].values) for state in states], axis=0)
