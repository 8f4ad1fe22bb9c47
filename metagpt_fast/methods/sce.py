"""SCE: select, calculate, erase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .parameters import parameter
from .rules import KeepAll, KeepNone, KeepVariable, Rule
from .sparse import SQUARES_KEPT, Election, SparseMethod

if TYPE_CHECKING:
    from .base import FloatArray


@dataclass(frozen=True)
class SCE(SparseMethod):
    """Select the elements that vary most across models, weight each model by its squared norm, erase minority signs.

    Wan et al., "FuseChat", arXiv 2408.07990. The weights are MetaGPT's for one tensor, of the selected elements.
    mergekit takes equal weights where the mean squares sum to less than 1e-6, which ordinary fine-tunes reach; here the
    ratio is always the true one. As there, the divisor is at least 1e-6.
    """

    name: ClassVar[str] = "sce"
    equation: ClassVar[str] = "w_t ∝ ‖τ_t‖² of the elements with the largest variance; minority signs erased"

    select_topk: float = parameter(1.0, "share of the varying elements that is kept", minimum=0, maximum=1)
    int8_mask: bool = parameter(False, "accepted for mergekit's sake, without effect")

    @property
    def needs_moments(self) -> bool:
        """Return True: the weights are squared norms."""
        return True

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps the elements with the largest variance, the same for every model."""
        if self.select_topk >= 1:
            return KeepAll()
        return KeepNone() if self.select_topk <= 0 else KeepVariable(self.select_topk)

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return w_t ∝ ‖τ_t‖², with signs elected by the unweighted sum."""
        total = float(moments[:, SQUARES_KEPT].sum())
        ones = np.ones(len(moments))
        weights = moments[:, SQUARES_KEPT] / total if total > 0 else ones / len(moments)
        return Election(weights, weights, elects=True, normalizes=True, votes=ones, floor=1e-6)
