"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import BaseUse, Method
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class Passthrough(Method):
    """θ = s · θ₁: the model's tensors, times ``scale`` if given.

    For recipes that stack slices of models, and for changes of dtype. The base gives config and tokenizer.
    """

    name: ClassVar[str] = "passthrough"
    equation: ClassVar[str] = "w = scale, or 1"
    needs_measurement: ClassVar[bool] = False
    base: ClassVar[BaseUse] = "ignored"
    granularity: ClassVar[str] = "model"
    num_models: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: tuple[float | None, ...] = parameter(None, "factor of the weights", per_model=True, type=float)

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the factor, float64 ``[1]``."""
        (scale,) = self.scale
        return np.array([1.0 if scale is None else scale])
