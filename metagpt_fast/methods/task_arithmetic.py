"""Task arithmetic: given scaling coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Method, check_num_coefficients, expand, expect_coefficients

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """θ = θ₀ + Σ_t λ_t τ_t with given λ.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; Eq. 2 of the MetaGPT paper (arXiv 2406.11385).

    Args:
        coefficients: λ, one number for all models or one per model. 0.3 is the usual choice without data.
    """

    name: ClassVar[str] = "task_arithmetic"
    equation: ClassVar[str] = "λ_t given (default 0.3 each)"
    needs_measurement: ClassVar[bool] = False

    coefficients: tuple[float, ...] = (0.3,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", expect_coefficients(self.name, self.coefficients))

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError unless there is one coefficient for all models, or one for each."""
        check_num_coefficients(self.name, self.coefficients, num_models)

    def solve(self, gram: FloatArray) -> FloatArray:
        """Return the given λ, float64 ``[T]``."""
        return expand(self.coefficients, gram.shape[0] - 1)
