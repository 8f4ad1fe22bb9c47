"""Multi-SLERP: the direction of the mean direction, with the mean norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import DataError, RecipeError
from .angles import UNRESOLVED
from .base import BaseUse, Method, expand, of_models
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class MultiSlerp(Method):
    """θ = θ₀ + (Σ_t w_t ‖τ_t‖) · m/‖m‖ with m = Σ_t w_t τ_t/‖τ_t‖; without a base, of the models.

    mergekit's (Goddard, "Multi-SLERP"), which describes more: unit vectors go to the tangent space at m/‖m‖, their
    weighted mean u is taken there and comes back by the exponential map. But u = Σ w_t (τ̂_t − ⟨τ̂_t, m̂⟩ m̂) = m − ‖m‖ m̂
    is 0 for any weights, so the map returns m̂. What is left of its steps is the factor cos(eps), and eps added to
    each norm by which is divided.

    One model is returned as it is. Where m = 0 two models are combined linearly, and more are an error.
    """

    name: ClassVar[str] = "multislerp"
    equation: ClassVar[str] = "w_t (Σ_k w_k ‖τ_k‖) / (‖τ_t‖ ‖Σ_k w_k τ_k/‖τ_k‖‖)"
    base: ClassVar[BaseUse] = "optional"

    weight: tuple[float, ...] = parameter(1.0, "w_t", per_model=True, required=True)
    normalize_weights: bool = parameter(True, "divide w by its sum")
    eps: float = parameter(1e-8, "added to the norms by which is divided", minimum=0)

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError unless there is one weight for all models or one for each, with a usable sum."""
        super().check_num_models(num_models)
        total = float(expand(self.weight, num_models).sum())
        if self.normalize_weights and num_models > 1 and abs(total) < 1e-12:
            raise RecipeError(
                "sum of the weights",
                where=f"{self.name}.weight",
                got=total,
                expected="a sum other than 0",
                hint="set normalize_weights=false to use the weights as they are",
            )

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the coefficients, float64 ``[T]``.

        Raises:
            DataError: the weighted unit vectors of three or more models add up to 0.
        """
        gram = of_models(gram, has_base)
        norms = np.sqrt(gram.diagonal())
        if len(norms) == 1:
            return np.ones(1)
        weights = expand(self.weight, len(norms))
        if self.normalize_weights:
            weights = weights / weights.sum()
        if not norms.any():
            return weights  # of zero vectors: 0, whatever the weights are
        shares = np.divide(weights, norms + self.eps, out=np.zeros_like(norms), where=norms > 0)
        # ‖m‖² loses digits only where the unit vectors cancel (weights of both signs, opposite vectors). Cosines near 1
        # and positive weights add up terms of one sign, and keep the Gram matrix's relative error.
        square = float(shares @ gram @ shares)
        if square <= max(self.eps**2, UNRESOLVED * float(np.abs(shares) @ norms) ** 2):
            if len(norms) == 2:
                return weights
            raise DataError(
                "the weighted directions of the models add up to 0, which has no direction",
                where=self.name,
                expected="models that do not point in opposite directions",
                hint="use other weights, or another method for this tensor",
            )
        coefficients: FloatArray = shares * (np.cos(self.eps) * float(weights @ norms) / np.sqrt(square))
        return coefficients
