"""Merge methods: one file per family. A new method is a subclass of Method, listed in METHODS."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Method
from .base import make_method as _make_method
from .linear import Linear
from .metagpt import MetaGPT
from .task_arithmetic import TaskArithmetic

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (MetaGPT, TaskArithmetic, Linear)}


def make_method(name: str, parameters: Mapping[str, object]) -> Method:
    """Return the method ``name`` with ``parameters``; raises RecipeError, naming what is allowed."""
    return _make_method(METHODS, name, parameters)


__all__ = ["METHODS", "Linear", "MetaGPT", "Method", "TaskArithmetic", "make_method"]
