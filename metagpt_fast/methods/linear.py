"""Linear: the weighted average of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import RecipeError
from .base import Method, check_num_coefficients, expand, expect_coefficients

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class Linear(Method):
    """θ = Σ_t w_t θ_t, divided by Σ_t w_t if ``normalize``.

    Wortsman et al., "Model soups", ICML 2022. The base gives config and tokenizer, and is not part of the average.

    Args:
        coefficients: w, one number for all models or one per model.
        normalize: whether the weights are divided by their sum.
    """

    name: ClassVar[str] = "linear"
    equation: ClassVar[str] = "w_t given (default equal), divided by Σ_k w_k"
    needs_measurement: ClassVar[bool] = False
    uses_base: ClassVar[bool] = False

    coefficients: tuple[float, ...] = (1.0,)
    normalize: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", expect_coefficients(self.name, self.coefficients))
        if not isinstance(self.normalize, bool):
            raise RecipeError(
                "parameter",
                where=f"{self.name}.normalize",
                got=repr(self.normalize),
                expected="true or false",
            )

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError unless there is one weight for all models or one for each, with a usable sum."""
        check_num_coefficients(self.name, self.coefficients, num_models)
        total = sum(self.coefficients) if len(self.coefficients) > 1 else num_models * self.coefficients[0]
        if self.normalize and abs(total) < 1e-12:
            raise RecipeError(
                "sum of the weights",
                where=f"{self.name}.coefficients",
                got=total,
                expected="a sum other than 0",
                hint="set normalize=false to use the weights as they are",
            )

    def solve(self, gram: FloatArray) -> FloatArray:
        """Return w, float64 ``[T]``, divided by its sum if ``normalize``."""
        weights = expand(self.coefficients, gram.shape[0] - 1)
        return weights / weights.sum() if self.normalize else weights
