"""RAM: average where models overlap, keep what only one has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .parameters import parameter
from .rules import KeepAbove, Rule
from .sparse import NUM_KEPT, NUM_UNIQUE, Election, SparseMethod

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class RAM(SparseMethod):
    """The mean of τ_t over the models with |τ_t| > epsilon, element by element.

    "Reinforced Agent Merging", arXiv 2601.13572, as in mergekit.
    """

    name: ClassVar[str] = "ram"
    equation: ClassVar[str] = "mean of τ_t over the models with |τ_t| > epsilon"

    epsilon: float = parameter(1e-5, "least |τ| that counts as a change", minimum=0)

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps changes larger than epsilon."""
        return KeepAbove(self.epsilon)

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return a mean over the models that changed the element."""
        ones = np.ones(len(moments))
        return Election(ones, ones, normalizes=True)


@dataclass(frozen=True)
class RAMPlus(RAM):
    """RAM, with what only one model has changed scaled by 1 + r · min(shared / unique, alpha) of that model and tensor.

    arXiv 2601.13572; "tensor-local" as in mergekit: elements are counted in each tensor. unique counts as epsilon where
    it is 0.
    """

    name: ClassVar[str] = "ramplus_tl"
    equation: ClassVar[str] = "as ram, what only one model changed is amplified"

    r: float = parameter(0.1, "strength of the amplification")
    alpha: float = parameter(0.2, "most that shared / unique counts for", minimum=0)

    @property
    def needs_moments(self) -> bool:
        """Return True: shared and unique elements are counted."""
        return True

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return RAM's mean with the factors of unique elements."""
        unique = moments[:, NUM_UNIQUE]
        shared = moments[:, NUM_KEPT] - unique
        factors = 1 + self.r * np.clip(shared / np.maximum(unique, max(self.epsilon, 1e-300)), 0, self.alpha)
        ones = np.ones(len(moments))
        return Election(ones, ones, normalizes=True, uniques=factors)
