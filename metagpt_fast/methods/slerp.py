"""Slerp: from the base to one model along the arc between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .angles import spherical_weights
from .base import BaseUse, Method, of_models
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray

_LARGEST_COSINE = 0.9995
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class Slerp(Method):
    """θ = sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁, Ω the angle between base and model.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, as in mergekit: where |cos Ω| > 0.9995, as
    nearly always between models of one base, the interpolation is linear; a norm up to 1e-8 counts as 1, so that a zero
    vector is at a right angle to everything.
    """

    name: ClassVar[str] = "slerp"
    equation: ClassVar[str] = "w = sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω; 1−t and t where |cos Ω| > 0.9995"
    base: ClassVar[BaseUse] = "model"
    num_models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: float = parameter(0.5, "place between base (0) and model (1)", required=True)

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the weights of base and model, float64 ``[2]``."""
        gram = of_models(gram, has_base)
        norms = np.sqrt(gram.diagonal())
        norms = np.where(norms > _SMALLEST_NORM, norms, 1.0)
        cosine = np.clip(gram[0, 1] / norms[0] / norms[1], -1, 1)
        # Both ends of the range of cosines are linear, so that no error of the Gram matrix is divided by a small sine.
        return spherical_weights(cosine, self.t, np.abs(cosine) > _LARGEST_COSINE)
