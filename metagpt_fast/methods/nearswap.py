"""NearSwap: the model where it is near the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .parameters import parameter
from .rules import KeepNear, Rule
from .sparse import Election, SparseMethod

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class NearSwap(SparseMethod):
    """θ = θ₀ + w τ with w = min(t / max(|τ|, 1e-6), 1), element by element: no change exceeds t.

    As mergekit's; by alchemonaut, published with QuartetAnemoi-70B.
    """

    name: ClassVar[str] = "nearswap"
    equation: ClassVar[str] = "min(t / |τ|, 1) of each element"
    num_models: ClassVar[tuple[int, int | None]] = (1, 1)

    t: float = parameter(0.001, "largest change of an element", required=True, minimum=0)

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that weights every element."""
        return KeepNear(self.t)

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return a plain sum of one model."""
        return Election(np.ones(1), np.ones(1))
