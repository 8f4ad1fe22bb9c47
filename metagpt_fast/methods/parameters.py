"""Parameters of merge methods: dataclass fields that know their name in recipes, their type and their range.

A method's parameters are the fields of its dataclass. ``--set NAME=VALUE``, the Python API, recipes, reports and error
messages all follow from what is declared here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import RecipeError


@dataclass(frozen=True)
class ParameterSpec:
    """What a recipe has to know of a parameter.

    Attributes:
        name: its name in recipes and on the command line.
        field: the dataclass field that holds it (``lambda`` is no name for one).
        type: ``float``, ``int``, ``bool`` or ``str``, of one value.
        per_model: whether there is one value per model; the field is then a tuple of one value, or one per model.
        required: whether a recipe has to give it, as mergekit asks.
        default: of one value.
        minimum: the least number allowed, or None.
        maximum: the largest number allowed, or None.
        choices: the texts allowed; empty for other types.
        optional: whether None stands for "not given".
        meaning: for ``--help`` and documentation, in a few words.
    """

    name: str
    field: str
    type: type
    per_model: bool
    required: bool
    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    meaning: str = ""


def parameter(
    default: Any,
    meaning: str,
    *,
    name: str | None = None,
    per_model: bool = False,
    required: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    type: type | None = None,
) -> Any:
    """Return a dataclass field for a parameter; see :class:`ParameterSpec`. ``type`` is that of the default."""
    metadata = {
        "name": name,
        "type": type or default.__class__,
        "per_model": per_model,
        "required": required,
        "default": default,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "optional": default is None,
        "meaning": meaning,
    }
    return dataclasses.field(default=(default,) if per_model else default, metadata=metadata)


def specs_of(cls: type) -> dict[str, ParameterSpec]:
    """Return the parameters of a method's class by their names in recipes."""
    specs = {}
    for field in dataclasses.fields(cls):
        facts = dict(field.metadata)
        name = facts.pop("name") or field.name
        specs[name] = ParameterSpec(name=name, field=field.name, **facts)
    return specs


def checked(method: str, spec: ParameterSpec, value: Any) -> Any:
    """Return the value of a field as the method keeps it, or raise RecipeError naming the parameter.

    For a parameter per model: one value, or a sequence (an array) of one value per model, as a tuple.
    """
    if not spec.per_model:
        return _checked_one(f"{method}.{spec.name}", spec, value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if not value:
            raise RecipeError(
                "parameter", where=f"{method}.{spec.name}", got="[]", expected="a number, or one per model"
            )
        return tuple(_checked_one(f"{method}.{spec.name}[{i}]", spec, item) for i, item in enumerate(value))
    return (_checked_one(f"{method}.{spec.name}", spec, value),)


def _checked_one(where: str, spec: ParameterSpec, value: Any) -> Any:
    if value is None and spec.optional:
        return None
    if spec.type is bool:
        if isinstance(value, bool):
            return value
        raise RecipeError("parameter", where=where, got=repr(value), expected="true or false")
    if spec.type is str:
        if isinstance(value, str) and (not spec.choices or value in spec.choices):
            return value
        raise RecipeError("parameter", where=where, got=repr(value), expected=", ".join(spec.choices) or "a text")
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's numbers are Real, too
        with contextlib.suppress(OverflowError):
            number = float(value)
            low = -math.inf if spec.minimum is None else spec.minimum
            high = math.inf if spec.maximum is None else spec.maximum
            is_whole = spec.type is not int or number == int(number) if math.isfinite(number) else False
            if math.isfinite(number) and is_whole and low <= number <= high:
                return int(number) if spec.type is int else number
    raise RecipeError("parameter", where=where, got=repr(value), expected=_number(spec))


def _number(spec: ParameterSpec) -> str:
    kind = "a whole number" if spec.type is int else "a finite number"
    if spec.minimum is not None and spec.maximum is not None:
        kind += f" from {spec.minimum:g} to {spec.maximum:g}"
    elif spec.minimum is not None:
        kind += f" of at least {spec.minimum:g}"
    return f"{kind}, or one per model" if spec.per_model else kind
