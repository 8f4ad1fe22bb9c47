"""What a sparse method is: masks over task vectors, and a rule by which the models agree on each element.

    out = base + λ · Σ_t w_t r_t m_t(e) δ_t(e) / Σ_t w_t        over the models that count at element e

m_t is the mask of model t (:mod:`metagpt_fast.methods.rules`), r_t a rescaling, w_t a weight. With an election only the
models count whose sign is that of the weighted sum.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RecipeError
from .base import Method

if TYPE_CHECKING:
    from .base import FloatArray
    from .rules import Rule

# Columns of the moments that layer_moments measures per model.
NUM_KEPT, L1, L1_KEPT, SQUARES, SQUARES_KEPT, NUM_UNIQUE = range(6)


@dataclass(frozen=True)
class Election:
    """How the models are combined at each element of a tensor.

    Attributes:
        scales: what each model's masked δ is multiplied with, w_t r_t: float64 ``[T]``.
        weights: w_t, what the divisor adds up: float64 ``[T]``.
        factor: λ.
        elects: whether only models with the majority's sign count.
        normalizes: whether the sum is divided by the weights of those that count.
        votes: what each model's δ is multiplied with when signs are elected; None for ``scales``.
        uniques: factor where one model alone counts, float64 ``[T]``; None for 1.
        floor: least divisor, where it is positive.
    """

    scales: FloatArray
    weights: FloatArray
    factor: float = 1.0
    elects: bool = False
    normalizes: bool = False
    votes: FloatArray | None = None
    uniques: FloatArray | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class SparseMethod(Method):
    """A method that keeps some elements of each task vector; its thresholds are those of each tensor.

    Attributes:
        needs_moments: whether ``squares`` or ``election`` read the moments, which takes a pass over the tensor.
    """

    @abstractmethod
    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return which elements of a model's task vector are kept, for a tensor of ``numel`` elements."""

    @abstractmethod
    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return how the models are combined in one tensor.

        Args:
            moments: float64 ``[T, 6]``: elements kept, Σ|δ|, Σ|δ|m, Σδ², Σδ²m², elements that only this model keeps;
                zeros if not ``needs_moments``.
            squares: float64 ``[T]``, what :meth:`squares` gave, summed over the scope.
        """

    @property
    def uses_measurement(self) -> bool:
        """Return False: Gram matrices say nothing about masked task vectors."""
        return False

    @property
    def needs_moments(self) -> bool:
        """Return whether the sums over masked task vectors are needed."""
        return False

    def squares(self, moments: FloatArray) -> FloatArray:
        """Return what is summed over the scope before ``election``, float64 ``[T]``, from one tensor's moments."""
        return np.zeros(len(moments))

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Not used: a sparse method has no coefficients that a Gram matrix determines."""
        raise RecipeError(f"{self.name} is no linear combination", where="method")


def rescaling(moments: FloatArray, smallest: float = 1e-7) -> FloatArray:
    """Return r_t = Σ|δ| / Σ|δ|m, float64 ``[T]``: a masked task vector keeps its L1 norm; 1 where a sum is nearly 0.

    mergekit's rule, in place of DARE's 1/density (Yu et al., arXiv 2311.03099), which is its expectation.
    """
    before, after = moments[:, L1], moments[:, L1_KEPT]
    usable = (before >= smallest) & (after >= smallest)
    ratio: FloatArray = np.divide(before, after, out=np.ones_like(before), where=usable)
    return ratio
