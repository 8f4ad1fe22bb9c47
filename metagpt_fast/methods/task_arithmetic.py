"""Task arithmetic: given scaling coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Method, expand, of_models
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """θ = θ₀ + λ Σ_t w_t τ_t with given w, divided by Σ_t w_t if ``normalize``.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089; Eq. 2 of the MetaGPT paper
    (arXiv 2406.11385). 0.3 for each model is the usual choice without data.
    """

    name: ClassVar[str] = "task_arithmetic"
    equation: ClassVar[str] = "w_t given (default 0.3 each)"
    needs_measurement: ClassVar[bool] = False
    granularity: ClassVar[str] = "model"

    weight: tuple[float, ...] = parameter(0.3, "w_t, the scaling coefficients", per_model=True, required=True)
    normalize: bool = parameter(False, "divide by Σ w_t")
    lambda_: float = parameter(1.0, "factor of the sum", name="lambda")
    int8_mask: bool = parameter(False, "accepted for mergekit's sake, without effect")

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return λ w, float64 ``[T]``."""
        weights = expand(self.weight, len(of_models(gram, has_base)))
        return self.lambda_ * weights / normalizer(weights, self.normalize)


def normalizer(weights: FloatArray, normalize: bool) -> float:
    """Return Σ w if ``normalize`` and it is not nearly 0, else 1 (as mergekit does)."""
    total = float(weights.sum())
    return total if normalize and abs(total) >= 1e-8 else 1.0
