"""TIES, DARE, Breadcrumbs, DELLA: task arithmetic on pruned task vectors, with or without an election of signs.

They differ in which elements are kept (``rule``), and in whether signs are elected, sums are normalized and pruned task
vectors are rescaled. Each prunes tensor by tensor; weights may be given or MetaGPT's, as in Table 4 of its paper (arXiv
2406.11385).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import RecipeError
from .base import expand
from .metagpt import share_of_squares
from .parameters import parameter
from .rules import KeepAll, KeepByRank, KeepNone, KeepRandomly, KeepRanks, Rule
from .sparse import SQUARES, SQUARES_KEPT, Election, SparseMethod, rescaling
from .task_arithmetic import normalizer

if TYPE_CHECKING:
    from .base import FloatArray

_WEIGHT = "w_t, weight of a pruned task vector"
_DENSITY = "share of its elements that a task vector keeps; 1 prunes nothing"
_NORMALIZE = "divide by the weights of the models that count"
_RESCALE = "give a pruned task vector its L1 norm back"
_SEED = "of the random masks: the same seed gives the same masks"


@dataclass(frozen=True)
class PruningMethod(SparseMethod):
    """θ = θ₀ + λ Σ_t w_t r_t m_t τ_t, over the models that agree in sign if signs are elected.

    ``coefficients`` = ``metagpt`` puts MetaGPT's λ_t ∝ ‖τ_t‖^p for w_t. Which vectors the norms are of, the paper does
    not say: by default those that are merged, pruned and rescaled; with ``coefficients_from`` = ``raw`` the task
    vectors as they came. The granularity says over what they are summed.
    """

    elects: ClassVar[bool] = False

    weight: tuple[float, ...] = parameter(1.0, _WEIGHT, per_model=True, required=True)
    density: tuple[float, ...] = parameter(1.0, _DENSITY, per_model=True, minimum=0, maximum=1)
    normalize: bool = parameter(False, _NORMALIZE)
    rescale: bool = parameter(False, _RESCALE)
    lambda_: float = parameter(1.0, "factor of the sum", name="lambda")
    int8_mask: bool = parameter(False, "accepted for mergekit's sake, without effect")
    coefficients: str = parameter("given", "where w_t come from", choices=("given", "metagpt"))
    coefficients_from: str = parameter(
        "merged", "vectors whose norms MetaGPT's weights take", choices=("merged", "raw")
    )
    exponent: float = parameter(2.0, "p of λ_t ∝ ‖τ_t‖^p, with coefficients = metagpt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients == "metagpt" and self.weight != (1.0,):
            raise RecipeError(
                "weights are given and asked for",
                where=f"{self.name}.weight",
                got=list(self.weight),
                expected="either weight, or coefficients = metagpt, which computes them",
            )

    @property
    def default_granularity(self) -> str:
        """Return ``model`` for MetaGPT's coefficients, as in its paper; given weights need no scope."""
        return "model" if self.coefficients == "metagpt" else "tensor"

    @property
    def needs_moments(self) -> bool:
        """Return whether rescaling or MetaGPT's coefficients need sums over the masked task vectors."""
        return self.coefficients == "metagpt" or (self.rescale and self._prunes)

    def squares(self, moments: FloatArray) -> FloatArray:
        """Return ‖τ_t‖² of one tensor, float64 ``[T]``: of the pruned and rescaled vectors, or of the raw ones."""
        if self.coefficients_from == "raw":
            return moments[:, SQUARES]
        squares: FloatArray = self._rescaling(moments) ** 2 * moments[:, SQUARES_KEPT]
        return squares

    def election(self, moments: FloatArray, squares: FloatArray) -> Election:
        """Return weights, rescaling and how signs are elected; see :class:`SparseMethod`."""
        is_metagpt = self.coefficients == "metagpt"
        weights = share_of_squares(squares, self.exponent) if is_metagpt else expand(self.weight, len(moments))
        divisor = 1.0 if self.elects else normalizer(weights, self.normalize)
        return Election(
            scales=weights * self._rescaling(moments),
            weights=weights,
            factor=self.lambda_ / divisor,
            elects=self.elects,
            normalizes=self.elects and self.normalize,
        )

    def warnings(self) -> list[str]:
        """Return sentences if nothing is pruned, and if MetaGPT's exponent is given without its coefficients."""
        warnings = []
        if not self._prunes:
            keeps = "a density such as 0.5 keeps half of each task vector"
            warnings.append(f"{self.name} with density 1 prunes nothing; {keeps}")
        if self.exponent != 2 and self.coefficients != "metagpt":
            warnings.append("exponent has no effect without coefficients = metagpt")
        return warnings

    @property
    def _prunes(self) -> bool:
        return any(density < 1 for density in self.density)

    def _rescaling(self, moments: FloatArray) -> FloatArray:
        return rescaling(moments) if self.rescale and self._prunes else np.ones(len(moments))


def _of(values: tuple[float, ...], model: int) -> float:
    return values[model if len(values) > 1 else 0]


@dataclass(frozen=True)
class Ties(PruningMethod):
    """Keep each task vector's largest magnitudes, elect signs, average what agrees.

    Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708. max(1, int(density · n)) of a tensor's n elements are
    kept. As in mergekit signs are elected by weighted sums, and the average is weighted.
    """

    name: ClassVar[str] = "ties"
    equation: ClassVar[str] = "largest |τ_t| kept, signs elected, Σ w_t τ_t / Σ w_t over those that agree"
    elects: ClassVar[bool] = True

    normalize: bool = parameter(True, _NORMALIZE)

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps the largest magnitudes."""
        density = _of(self.density, model)
        if density >= 1:
            return KeepAll()
        return KeepNone() if density <= 0 or numel == 0 else KeepRanks(0, max(1, int(density * numel)))


@dataclass(frozen=True)
class DareLinear(PruningMethod):
    """Drop elements at random, give what is left its L1 norm back, add up.

    Yu et al., "Language Models are Super Mario", ICML 2024, arXiv 2311.03099. The paper rescales by 1/density;
    mergekit, and this method, by the ratio of the L1 norms, which is that on average.
    """

    name: ClassVar[str] = "dare_linear"
    equation: ClassVar[str] = "Σ w_t τ_t of task vectors whose elements are kept at random, and rescaled"

    rescale: bool = parameter(True, _RESCALE)
    seed: int = parameter(0, _SEED, minimum=0)

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps elements at random."""
        density = _of(self.density, model)
        return KeepAll() if density >= 1 else KeepRandomly(density, self.seed)


@dataclass(frozen=True)
class DareTies(DareLinear):
    """DARE's pruning, then TIES' election of signs (not normalized unless asked); arXiv 2311.03099 and 2306.01708."""

    name: ClassVar[str] = "dare_ties"
    equation: ClassVar[str] = "as dare_linear, over the models whose sign is elected"
    elects: ClassVar[bool] = True


@dataclass(frozen=True)
class Breadcrumbs(PruningMethod):
    """Drop each task vector's outliers and its small elements, add up.

    Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv 2312.06795. int(density · n) elements are kept, below
    the int(gamma · n) largest magnitudes; fewer of the largest are dropped where that would leave too few.
    """

    name: ClassVar[str] = "breadcrumbs"
    equation: ClassVar[str] = "Σ w_t τ_t of task vectors without their largest and smallest elements"

    gamma: tuple[float, ...] = parameter(
        0.01, "share of its largest elements that a task vector loses", per_model=True, minimum=0, maximum=1
    )

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps a band of magnitudes."""
        density = _of(self.density, model)
        if density >= 1:
            return KeepAll()
        num_kept = int(density * numel)
        num_bottom = max(0, numel - num_kept - int(_of(self.gamma, model) * numel))
        return KeepRanks(numel - num_bottom - num_kept, num_kept) if num_kept else KeepNone()


@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Breadcrumbs' pruning, then TIES' election of signs; arXiv 2312.06795 and 2306.01708."""

    name: ClassVar[str] = "breadcrumbs_ties"
    equation: ClassVar[str] = "as breadcrumbs, over the models whose sign is elected"
    elects: ClassVar[bool] = True


@dataclass(frozen=True)
class DellaLinear(PruningMethod):
    """Drop elements at random, small ones more often; give what is left its L1 norm back, add up.

    Deep et al., "DELLA-Merging", arXiv 2406.11617. The probability to be kept rises with the rank of the magnitude in
    its row, from density − epsilon to density + epsilon.
    """

    name: ClassVar[str] = "della_linear"
    equation: ClassVar[str] = "as dare_linear, the larger elements of a row kept more often"

    rescale: bool = parameter(True, _RESCALE)
    epsilon: tuple[float, ...] = parameter(
        0.15, "half the range of the probabilities around density", per_model=True, minimum=0, maximum=1
    )
    seed: int = parameter(0, _SEED, minimum=0)

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError also if density ± epsilon leaves (0, 1)."""
        super().check_num_models(num_models)
        for model in range(num_models):
            density, epsilon = _of(self.density, model), _of(self.epsilon, model)
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise RecipeError(
                    "density ± epsilon",
                    where=f"{self.name}.epsilon",
                    got=f"density {density:g}, epsilon {epsilon:g}",
                    expected="both density − epsilon and density + epsilon between 0 and 1",
                )

    def rule(self, model: int, numel: int, num_models: int) -> Rule:
        """Return the rule that keeps elements at random by rank."""
        density, epsilon = _of(self.density, model), _of(self.epsilon, model)
        if density >= 1:
            return KeepAll()
        return KeepNone() if density <= 0 else KeepByRank(density - epsilon, density + epsilon, self.seed)


@dataclass(frozen=True)
class Della(DellaLinear):
    """DELLA's pruning, then TIES' election of signs and average; arXiv 2406.11617 and 2306.01708."""

    name: ClassVar[str] = "della"
    equation: ClassVar[str] = "as della_linear, averaged over the models whose sign is elected"
    elects: ClassVar[bool] = True

    normalize: bool = parameter(True, _NORMALIZE)
