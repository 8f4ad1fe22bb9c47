"""Linear: the weighted average of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import RecipeError
from .base import BaseUse, Method, expand, of_models
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class Linear(Method):
    """θ = Σ_t w_t θ_t, divided by Σ_t w_t if ``normalize``.

    Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482. The base gives config and tokenizer, and is not part of
    the average; in a recipe a base that is listed among the models is a model.
    """

    name: ClassVar[str] = "linear"
    equation: ClassVar[str] = "w_t given (default equal), divided by Σ_k w_k"
    needs_measurement: ClassVar[bool] = False
    base: ClassVar[BaseUse] = "ignored"
    granularity: ClassVar[str] = "model"

    weight: tuple[float, ...] = parameter(1.0, "w_t", per_model=True, required=True)
    normalize: bool = parameter(True, "divide by Σ w_t")

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError unless there is one weight for all models or one for each, with a usable sum."""
        super().check_num_models(num_models)
        total = float(expand(self.weight, num_models).sum())
        if self.normalize and abs(total) < 1e-12:
            raise RecipeError(
                "sum of the weights",
                where=f"{self.name}.weight",
                got=total,
                expected="a sum other than 0",
                hint="set normalize=false to use the weights as they are",
            )

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return w, float64 ``[T]``, divided by its sum if ``normalize``."""
        weights = expand(self.weight, len(of_models(gram, has_base)))
        return weights / weights.sum() if self.normalize else weights
