"""Arcee Fusion: the important changes of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .rules import KeepImportant, Rule
from .sparse import Election, SparseMethod

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class ArceeFusion(SparseMethod):
    """Keep τ where |τ| · KL(softmax(row of θ) ‖ softmax(row of θ₀)) ≥ median + 1.5 · (Q3 − Q1) of the tensor.

    As mergekit's, by Arcee AI. Quantiles are exact; mergekit takes them from a random sample of tensors of more than
    10⁶ elements.
    """

    name: ClassVar[str] = "arcee_fusion"
    equation: ClassVar[str] = "τ where |τ| · KL(softmax(row of θ) ‖ softmax(row of θ₀)) is an outlier"
    num_models: ClassVar[tuple[int, int | None]] = (1, 1)

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps important elements."""
        return KeepImportant()

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return a plain sum of one model."""
        return Election(np.ones(1), np.ones(1))
