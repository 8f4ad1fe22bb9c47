"""What a mergekit configuration says to this package: parameters that mergekit's own methods have not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ..errors import IntegrationError, MetagptFastError, RecipeError
from ..methods import METHODS, Method

SUPPORTED_VERSIONS = ("0.1.5",)
# Besides the parameters of our methods: over what coefficients are solved.
GRANULARITY = "granularity"
# Keys that recipes of this package may have at their top level; mergekit would drop them there.
TOP_LEVEL = (GRANULARITY, "exponent", "coefficients", "coefficients_from")


def check_version() -> str:
    """Return mergekit's version.

    Raises:
        IntegrationError: mergekit is not installed, or in a version that this package has not been tested with.
    """
    expected = " or ".join(f"mergekit {version}" for version in SUPPORTED_VERSIONS)
    hint = f"pip install mergekit=={SUPPORTED_VERSIONS[-1]}"
    try:
        version = metadata.version("mergekit")
    except metadata.PackageNotFoundError as error:
        raise IntegrationError("mergekit is not installed", expected=expected, hint=hint) from error
    if version not in SUPPORTED_VERSIONS:
        raise IntegrationError(
            "this version of mergekit is not supported", got=f"mergekit {version}", expected=expected, hint=hint
        )
    return version


@contextmanager
def mergekit_errors(where: object) -> Iterator[None]:
    """Turn what mergekit, and what it uses, raises within the block into an IntegrationError."""
    try:
        yield
    except MetagptFastError:
        raise
    except Exception as error:  # of mergekit, transformers, pydantic, the hub's client
        raise IntegrationError(f"mergekit: {type(error).__name__}", where=where, got=error) from error


@dataclass(frozen=True)
class Extras:
    """Settings for the whole merge that mergekit's own methods do not have.

    Attributes:
        parameters: by their names in recipes, such as ``coefficients`` of ties, ``seed`` of dare_linear.
        granularity: ``model``, ``layer`` or ``tensor``; None for the method's own.
    """

    parameters: Mapping[str, Any]
    granularity: str | None

    @property
    def computes_weights(self) -> bool:
        """Return whether the weights are MetaGPT's, so that none have to be given."""
        return self.parameters.get("coefficients") == "metagpt"


def extras_of(config: Any, mergekit_names: Sequence[str]) -> Extras:
    """Return what the top-level ``parameters`` have of a method's parameters that mergekit does not know.

    Args:
        config: mergekit's ``MergeConfiguration``.
        mergekit_names: the parameters that mergekit's method has.

    Raises:
        RecipeError: one of them is no single value, or weights are given and asked for.
    """
    method: type[Method] | None = METHODS.get(config.merge_method)
    if method is None:
        return Extras({}, None)
    known = {*method.specs(), GRANULARITY} - {*mergekit_names, "int8_mask"}
    found = {name: value for name, value in (config.parameters or {}).items() if name in known}
    for name, value in found.items():
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(
                f"{name} is one value for the whole merge",
                where=f"parameters.{name}",
                got=type(value).__name__,
                expected="a number or a text",
                hint="weights that differ by model are given as weight" if name == "coefficients" else None,
            )
    granularity = found.pop(GRANULARITY, None)
    extras = Extras(found, None if granularity is None else str(granularity))
    if extras.computes_weights and any("weight" in scope for scope in _scopes(config)):
        raise RecipeError(
            "weights are given and asked for",
            where="parameters",
            got="weight, and coefficients: metagpt",
            expected="one of them",
        )
    return extras


def with_weight(config: Any) -> Any:
    """Return a copy of the configuration that gives every model a weight of 1, for mergekit's planner to find one."""
    copy = config.model_copy(deep=True)
    copy.parameters = {**(copy.parameters or {}), "weight": 1.0}
    return copy


def _scopes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of every scope of a configuration."""
    yield config.parameters or {}
    modules = (config.modules or {}).values()
    for owner in (config, *modules):
        if owner is not config:
            yield owner.parameters or {}
        for model in owner.models or ():
            yield model.parameters or {}
        for each in owner.slices or ():
            yield each.parameters or {}
            for source in each.sources:
                yield source.parameters or {}
