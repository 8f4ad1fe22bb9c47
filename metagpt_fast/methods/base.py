"""What a merge method is: Gram matrix in, coefficients out.

A method is a frozen dataclass; its fields are its parameters (:mod:`metagpt_fast.methods.parameters`). The streaming
code knows none of the methods by name.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import RecipeError
from .parameters import ParameterSpec, checked, specs_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

BaseUse = Literal["required", "optional", "model", "ignored"]
Axis = Literal["row", "column"]


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A merge method that is a linear combination: ``out = base + Σ_t c_t (model_t − base)``, or ``Σ_t c_t model_t``.

    Attributes:
        name: what the user types.
        equation: the coefficients in one line, for --help and the model card.
        needs_measurement: whether ``solve`` reads the Gram matrix; if not, the weights are read once only.
        base: how the base takes part. ``required``: the merge adds task vectors to it. ``optional``: so if there is
            one, else models are combined (recipes only; the command always has one). ``model``: it is one more model,
            the first of them. ``ignored``: it gives config and tokenizer only.
        granularity: over what coefficients are solved unless the user says otherwise: ``model``, ``layer``, ``tensor``.
        num_models: how many models the method takes: (least, most), most None without a limit. Where ``base`` is
            ``model``, the base is counted.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    needs_measurement: ClassVar[bool] = True
    base: ClassVar[BaseUse] = "required"
    granularity: ClassVar[str] = "tensor"
    num_models: ClassVar[tuple[int, int | None]] = (1, None)

    @abstractmethod
    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the coefficients c, float64 ``[T]``, of one scope.

        Args:
            gram: the scope's Gram matrix: float64 ``[T+1, T+1]`` of ``[base, τ_1 ... τ_T]`` if the merge adds task
                vectors to a base, else float64 ``[T, T]`` of the models; zeros where ``needs_measurement`` is False.
            has_base: which of the two it is.
        """

    def solve_rows(self, grams: FloatArray, has_base: bool) -> FloatArray:
        """Return the coefficients of R scopes, float64 ``[R, T]``: of each row or column, for a method with an axis.

        A matrix has thousands of rows: methods with an axis should override this with array operations.

        Args:
            grams: their Gram matrices, float64 ``[R, V, V]``, each as for :meth:`solve`.
            has_base: as for :meth:`solve`.
        """
        import numpy as np

        num_models = grams.shape[1] - (1 if has_base else 0)
        solved = [self.solve(gram, has_base) for gram in grams]
        return np.array(solved, np.float64).reshape(len(grams), num_models)

    @property
    def uses_measurement(self) -> bool:
        """Return whether Gram matrices that were measured before can stand in for measuring."""
        return self.needs_measurement and self.base == "required" and self.axis is None

    @property
    def share_exponent(self) -> float | None:
        """Return p if coefficients are ``‖τ_t‖^p / Σ_k ‖τ_k‖^p``, which a GPU solves without the host; else None."""
        return None

    @property
    def default_granularity(self) -> str:
        """Return over what coefficients are solved unless the user says otherwise."""
        return self.granularity

    @property
    def axis(self) -> Axis | None:
        """Return whether coefficients are solved for each row, or column, of a matrix, and not for whole tensors.

        A row is what the last dimension runs through, a column what the first one does; a vector is one of either.
        """
        return None

    def __post_init__(self) -> None:
        for spec in self.specs().values():
            object.__setattr__(self, spec.field, checked(self.name, spec, getattr(self, spec.field)))

    @classmethod
    def specs(cls) -> dict[str, ParameterSpec]:
        """Return the parameters by their names in recipes."""
        return specs_of(cls)

    def check_num_models(self, num_models: int) -> None:
        """Raise RecipeError if the method cannot merge ``num_models`` models, or was given parameters for others."""
        least, most = self.num_models
        if num_models < least or (most is not None and num_models > most):
            expected = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            raise RecipeError(f"number of models for {self.name}", where="models", got=num_models, expected=expected)
        for spec in self.specs().values():
            count = len(getattr(self, spec.field)) if spec.per_model else 1
            if count not in {1, num_models}:
                raise RecipeError(
                    f"number of values of {spec.name}",
                    where=f"{self.name}.{spec.name}",
                    got=count,
                    expected=f"1 (the same for all) or {num_models} (one per model, in the order of the models)",
                )

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by their names in recipes."""
        return {name: getattr(self, spec.field) for name, spec in self.specs().items()}

    def warnings(self) -> list[str]:
        """Return sentences about parameters that do something else than a user may expect."""
        return []


def of_models(gram: FloatArray, has_base: bool) -> FloatArray:
    """Return the part of the Gram matrix that is of the T vectors being combined, float64 ``[T, T]``."""
    return gram[1:, 1:] if has_base else gram


def expand(values: Sequence[float], num_models: int) -> FloatArray:
    """Return one number per model, float64 ``[T]``, where one was given for all or one for each."""
    import numpy as np

    expanded: FloatArray = np.array(np.broadcast_to(np.asarray(values, np.float64), (num_models,)))
    return expanded
