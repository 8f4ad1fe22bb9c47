"""MetaGPT: scaling coefficients in closed form from the task vectors' norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Method
from .parameters import parameter

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class MetaGPT(Method):
    """λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p with τ_t = θ_t − θ₀; p = 2 is the paper.

    Zhou, Song, Wang, Chen, "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
    EMNLP 2024, arXiv 2406.11385, Eq. 15. The paper takes one λ per model over all parameters (granularity
    ``model``); ``layer`` and ``tensor`` apply the same formula to one decoder layer or one tensor.
    """

    name: ClassVar[str] = "metagpt"
    equation: ClassVar[str] = "λ_t = ‖θ_t − θ₀‖^p / Σ_k ‖θ_k − θ₀‖^p"
    granularity: ClassVar[str] = "model"

    exponent: float = parameter(2.0, "p: 2 is MetaGPT, 0 the plain average, below 0 favours small task vectors")

    @property
    def share_exponent(self) -> float:
        """Return p."""
        return self.exponent

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return λ, float64 ``[T]``, summing to 1; see :func:`share_of_squares`."""
        return share_of_squares(gram.diagonal()[1 if has_base else 0 :], self.exponent)


def share_of_squares(squares: FloatArray, exponent: float) -> FloatArray:
    """Return λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p, float64 ``[T]``, from the squared norms (arXiv 2406.11385, Eq. 15 for p = 2).

    λ sums to 1; it is all 0 where every task vector is zero (0/0: the base stays). With p ≤ 0 a zero task vector would
    take part with an infinite (or, p = 0, an arbitrary) weight: for p < 0 it gets 0, for p = 0 its equal share.

    Args:
        squares: ‖τ_t‖², float64 ``[T]``.
        exponent: p.
    """
    import numpy as np

    squares = np.asarray(squares, np.float64)
    largest = squares.max(initial=0.0)
    if largest == 0:
        return np.zeros_like(squares)
    if exponent == 0:
        return np.full_like(squares, 1 / squares.size)
    # Relative to the largest (for p > 0) or the smallest, so that no power overflows.
    changed = squares > 0
    reference = largest if exponent > 0 else squares[changed].min()
    powers = np.zeros_like(squares)
    # In logarithms: the ratio itself may leave the range of float64. All exponents are <= 0, so none overflows.
    logarithms = np.log(squares[changed]) - np.log(reference)
    powers[changed] = np.exp(exponent / 2 * logarithms)
    share: FloatArray = powers / powers.sum()
    return share
