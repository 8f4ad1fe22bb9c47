"""Model Stock: how far the average of fine-tuned models may go from the base, by the angle between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import Axis, Method
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray

_SMALLEST_PRODUCT = 1e-6
_SMALLEST_DIVISOR = 1e-6


@dataclass(frozen=True)
class ModelStock(Method):
    """θ = θ₀ + t · mean(τ) with t = N c / (1 + (N − 1) c), c the mean cosine between pairs of the N task vectors.

    Jang, Yun, Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522, as in
    mergekit: a product of two norms counts as at least 1e-6, which makes the cosines of very small task vectors smaller
    than they are; t = 0 where |1 + (N − 1) c| < 1e-6, where task vectors cancel. t is negative where c is.
    """

    name: ClassVar[str] = "model_stock"
    equation: ClassVar[str] = "w_t = c / (1 + (N − 1) c), c the mean cosine of the N task vectors"
    num_models: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool = parameter(False, "t of its own for each row of a matrix")

    @property
    def axis(self) -> Axis | None:
        """Return ``row`` if ``filter_wise``."""
        return "row" if self.filter_wise else None

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return t/N for each model, float64 ``[N]``."""
        coefficients: FloatArray = self.solve_rows(gram[None], has_base)[0]
        return coefficients

    def solve_rows(self, grams: FloatArray, has_base: bool) -> FloatArray:
        """Return t/N for each Gram matrix and model, float64 ``[R, N]``; see :meth:`Method.solve_rows`."""
        first = 1 if has_base else 0
        num_models = grams.shape[1] - first
        norms = np.sqrt(np.diagonal(grams, axis1=1, axis2=2)[:, first:])
        total = np.zeros(len(grams))
        for i in range(num_models):
            for j in range(i + 1, num_models):
                products = np.maximum(norms[:, i] * norms[:, j], _SMALLEST_PRODUCT)
                total += np.clip(grams[:, first + i, first + j] / products, -1, 1)
        mean = total / (num_models * (num_models - 1) / 2)
        # Cosines as they are measured, no 1 − cos: t has the Gram matrix's relative error divided by the divisor,
        # which is small only where task vectors cancel; there 1e-6 is about what a cosine is known to.
        divisor = 1 + (num_models - 1) * mean
        usable = np.abs(divisor) >= _SMALLEST_DIVISOR
        shares = np.divide(mean, divisor, out=np.zeros_like(mean), where=usable)
        return np.repeat(shares[:, None], num_models, axis=1)
