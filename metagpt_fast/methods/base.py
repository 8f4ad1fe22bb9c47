"""What a merge method is: Gram matrix in, coefficients out.

A method is a frozen dataclass. Its fields are its parameters, so ``--set NAME=VALUE``, the API, reports and errors all
follow from the class. The streaming code knows none of the methods by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A merge method: ``out = base + Σ_t c_t (model_t − base)``, or ``Σ_t c_t model_t`` without a base.

    Attributes:
        name: what the user types.
        equation: the coefficients in one line, for --help and the model card.
        needs_measurement: whether ``solve`` reads the Gram matrix; if not, the weights are read once only.
        uses_base: whether the base is part of the sum.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    needs_measurement: ClassVar[bool] = True
    uses_base: ClassVar[bool] = True

    @abstractmethod
    def solve(self, gram: FloatArray) -> FloatArray:
        """Return the coefficients c, float64 ``[T]``, of one scope.

        Args:
            gram: float64 ``[T+1, T+1]``, the scope's Gram matrix of ``[base, τ_1 ... τ_T]``; all zeros where
                ``needs_measurement`` is False.
        """

    def check_num_models(self, num_models: int) -> None:  # noqa: B027 (most methods take any number)
        """Raise RecipeError if the method cannot merge ``num_models`` models."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return dataclasses.asdict(self)


def expect_number(method: str, parameter: str, value: object) -> float:
    """Return ``value`` as a finite float, or raise RecipeError naming the method's parameter."""
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's numbers are Real, too
        with contextlib.suppress(OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    raise RecipeError("parameter", where=f"{method}.{parameter}", got=repr(value), expected="a finite number")


def expect_coefficients(method: str, value: object) -> tuple[float, ...]:
    """Return given coefficients (a number, a sequence or an array of them) as a tuple, or raise RecipeError."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        numbers = tuple(expect_number(method, f"coefficients[{i}]", item) for i, item in enumerate(value))
        if numbers:
            return numbers
    elif isinstance(value, Real):
        return (expect_number(method, "coefficients", value),)
    raise RecipeError(
        "parameter",
        where=f"{method}.coefficients",
        got=repr(value),
        expected="a number, or one number per model",
    )


def check_num_coefficients(method: str, coefficients: Sequence[float] | None, num_models: int) -> None:
    """Raise RecipeError unless there is one coefficient per model, one for all, or none."""
    if coefficients is not None and len(coefficients) not in {1, num_models}:
        raise RecipeError(
            "number of coefficients",
            where=f"{method}.coefficients",
            got=len(coefficients),
            expected=f"1 (the same for all) or {num_models} (one per model, in the order of the models)",
        )


def expand(coefficients: Sequence[float], num_models: int) -> FloatArray:
    """Return one coefficient per model, float64 ``[T]``, where one was given for all or one for each."""
    import numpy as np

    expanded: FloatArray = np.array(np.broadcast_to(np.asarray(coefficients, np.float64), (num_models,)))
    return expanded


def make_method(classes: Mapping[str, type[Method]], name: str, parameters: Mapping[str, object]) -> Method:
    """Return the method ``name`` with ``parameters``.

    Raises:
        RecipeError: there is no such method, it has no such parameter, or a value cannot be used.
    """
    found = classes.get(name)
    if found is None:
        raise RecipeError("unknown method", where="method", got=repr(name), expected=", ".join(sorted(classes)))
    allowed = [field.name for field in dataclasses.fields(found)]
    for parameter in parameters:
        if parameter not in allowed:
            raise RecipeError(
                f"{name} has no parameter {parameter!r}",
                where="method",
                expected=", ".join(allowed) or "no parameters",
                hint=_hint(classes, parameter),
            )
    return found(**parameters)


def _hint(classes: Mapping[str, type[Method]], parameter: str) -> str | None:
    owners = [name for name, cls in classes.items() if parameter in {field.name for field in dataclasses.fields(cls)}]
    return f"{parameter} belongs to {', '.join(owners)}" if owners else None
