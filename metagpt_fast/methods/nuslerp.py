"""NuSLERP: slerp between two models, or two task vectors, with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .angles import UNRESOLVED, spherical_weights
from .base import Axis, BaseUse, Method, expand
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray

_SMALLEST_NORM = 1e-7
_SMALLEST_SINE = 1e-8


@dataclass(frozen=True)
class NuSlerp(Method):
    """θ = θ₀ + sin((1−t)Ω)/sin Ω · τ₁ + sin(tΩ)/sin Ω · τ₂ with t = w₂ / (w₁ + w₂); without a base, of the models.

    mergekit's: t is 0.5 where |w₁ + w₂| < 1e-6; norms count as at least 1e-7; linear where sin Ω ≤ 1e-8. Here it is
    linear as well where cos Ω is within 1e-6 of −1: opposite vectors, whose weights 1 / sin Ω would amplify rounding
    errors 700 times and more.

    Ω is that of whole tensors, or, without ``nuslerp_flatten``, of each row (the last dimension), or with
    ``nuslerp_row_wise``, whose name says the contrary, of each column (the first dimension).
    """

    name: ClassVar[str] = "nuslerp"
    equation: ClassVar[str] = "w = sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω with t = w₂ / (w₁ + w₂)"
    base: ClassVar[BaseUse] = "optional"
    num_models: ClassVar[tuple[int, int | None]] = (2, 2)

    weight: tuple[float, ...] = parameter(1.0, "w_t", per_model=True, required=True)
    nuslerp_flatten: bool = parameter(True, "one angle for the whole tensor")
    nuslerp_row_wise: bool = parameter(False, "without flatten: an angle for each column, instead of each row")

    @property
    def axis(self) -> Axis | None:
        """Return what has an angle of its own: None, ``row`` or ``column``."""
        if self.nuslerp_flatten:
            return None
        return "column" if self.nuslerp_row_wise else "row"

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the weights of the two models, float64 ``[2]``."""
        coefficients: FloatArray = self.solve_rows(gram[None], has_base)[0]
        return coefficients

    def solve_rows(self, grams: FloatArray, has_base: bool) -> FloatArray:
        """Return the weights for each Gram matrix, float64 ``[R, 2]``; see :meth:`Method.solve_rows`."""
        first = 1 if has_base else 0
        squares = np.diagonal(grams, axis1=1, axis2=2)[:, first:]
        norms = np.maximum(np.sqrt(squares), _SMALLEST_NORM)
        # One division at a time: the product of two norms may leave the range of float64, a cosine does not.
        cosines = np.clip(grams[:, first, first + 1] / norms[:, 0] / norms[:, 1], -1, 1)
        straight = (1 - cosines) * (1 + cosines) <= _SMALLEST_SINE**2
        return spherical_weights(cosines, self._place, straight | (cosines < -1 + UNRESOLVED))

    @property
    def _place(self) -> float:
        weights = expand(self.weight, 2)
        total = float(weights.sum())
        return 0.5 if abs(total) < 1e-6 else float(weights[1]) / total
