"""Merge methods: one file per method or family. A new method is a subclass of Method or SparseMethod.

Those of this package are listed in METHODS; other packages announce theirs as entry points of the group
``metagpt_fast.methods`` (docs/methods.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..errors import RecipeError, suggestion
from .arcee_fusion import ArceeFusion
from .base import Method
from .karcher import Karcher
from .linear import Linear
from .metagpt import MetaGPT
from .model_stock import ModelStock
from .multislerp import MultiSlerp
from .nearswap import NearSwap
from .nuslerp import NuSlerp
from .parameters import ParameterSpec
from .passthrough import Passthrough
from .pruning import Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear, Ties
from .ram import RAM, RAMPlus
from .sce import SCE
from .slerp import Slerp
from .sparse import SparseMethod
from .task_arithmetic import TaskArithmetic

ENTRY_POINT_GROUP = "metagpt_fast.methods"

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        MetaGPT,
        TaskArithmetic,
        Linear,
        Slerp,
        NuSlerp,
        MultiSlerp,
        Karcher,
        ModelStock,
        Passthrough,
        Ties,
        DareLinear,
        DareTies,
        Breadcrumbs,
        BreadcrumbsTies,
        Della,
        DellaLinear,
        SCE,
        NearSwap,
        ArceeFusion,
        RAM,
        RAMPlus,
    )
}


def find_method(name: str) -> type[Method]:
    """Return the class of the method ``name``: one of this package, or of a package that announces one.

    Raises:
        RecipeError: there is no such method, or the package that has it cannot be loaded.
    """
    found = METHODS.get(name) or _announced().get(name)
    if found is None:
        names = sorted({**METHODS, **_announced()})
        raise RecipeError(
            "unknown method", where="method", got=repr(name), expected=", ".join(names), hint=suggestion(name, names)
        )
    return found


def make_method(name: str, parameters: Mapping[str, object]) -> Method:
    """Return the method ``name`` with ``parameters``, by their names in recipes.

    Raises:
        RecipeError: there is no such method, it has no such parameter, or a value cannot be used.
    """
    found = find_method(name)
    specs = found.specs()
    for parameter in parameters:
        if parameter not in specs:
            raise RecipeError(
                f"{name} has no parameter {parameter!r}",
                where="method",
                expected=", ".join(specs) or "no parameters",
                hint=_hint(parameter) or suggestion(parameter, specs),
            )
    return found(**{specs[parameter].field: value for parameter, value in parameters.items()})


def changed_parameters(name: str, parameters: Mapping[str, object]) -> dict[str, object]:
    """Return those of a method's parameters that differ from their defaults, for people to read."""
    defaults = {spec.name: (spec.default,) if spec.per_model else spec.default for spec in _specs(name).values()}
    return {
        parameter: value
        for parameter, value in parameters.items()
        if parameter not in defaults or (tuple(value) if isinstance(value, list) else value) != defaults[parameter]
    }


def describe_methods(name: str | None = None) -> list[dict[str, Any]]:
    """Return what there is to know of each method, or of one, as plain values.

    Raises:
        RecipeError: there is no method of this name.
    """
    classes = [find_method(name)] if name is not None else [*METHODS.values(), *_announced().values()]
    return [
        {
            "name": cls.name,
            "equation": cls.equation,
            "description": inspect.getdoc(cls) or "",
            "base": cls.base,
            "num_models": list(cls.num_models),
            "parameters": [
                {
                    "name": spec.name,
                    "type": spec.type.__name__,
                    "per_model": spec.per_model,
                    "default": spec.default,
                    "choices": list(spec.choices),
                    "meaning": spec.meaning,
                }
                for spec in cls.specs().values()
            ],
        }
        for cls in classes
    ]


def _specs(name: str) -> Mapping[str, ParameterSpec]:
    try:
        return find_method(name).specs()
    except RecipeError:  # of a package that was there when the report was written
        return {}


def _hint(parameter: str) -> str | None:
    owners = [name for name, cls in METHODS.items() if parameter in cls.specs()]
    return f"{parameter} belongs to {', '.join(owners)}" if owners else None


@cache
def _announced() -> dict[str, type[Method]]:
    """Return the methods of other installed packages; those of this package win."""
    from importlib.metadata import entry_points

    methods: dict[str, type[Method]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            cls = entry.load()
        except Exception as error:  # whatever a package raises while it is imported
            raise RecipeError(
                "a package announces a merge method that cannot be loaded",
                where=f"entry point {entry.name} = {entry.value}",
                got=f"{type(error).__name__}: {error}",
                hint="update or remove the package that announces it",
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise RecipeError(
                "a package announces something that is no merge method",
                where=f"entry point {entry.name} = {entry.value}",
                got=repr(cls),
                expected="a subclass of metagpt_fast.methods.Method",
            )
        methods[cls.name] = cls
    return methods


__all__ = [
    "METHODS",
    "Linear",
    "MetaGPT",
    "Method",
    "SparseMethod",
    "TaskArithmetic",
    "changed_parameters",
    "describe_methods",
    "find_method",
    "make_method",
]
