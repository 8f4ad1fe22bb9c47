"""The shape of a recipe: which keys there are and what they hold, as pydantic models, and one message for a mistake.

This is mergekit's configuration language (0.1.5) without what is refused below, and a few keys of our own. Numbers,
names of methods and paths are looked at later, by who needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import RecipeError, suggestion
from .recipe_yaml import YamlNode
from .untrusted import brief, printable

# What mergekit has and this package has not, with what to do instead.
REFUSED: Mapping[str, str] = {
    "modules": "merge models of one stack of layers with models: or slices:",
    "tokenizer": "all models have to share the base's tokenizer; tokenizer_source: base checks that they do",
    "chat_template": "the output gets the base's; edit chat_template.jinja or tokenizer_config.json afterwards",
    "residual_weight": "mergekit reads it and has no use for it; remove it",
}

# What each key holds, for messages.
_HOLDS: Mapping[str, str] = {
    "merge_method": "the name of a method, such as ties",
    "base_model": "the path of a folder or file",
    "model": "the path of a folder or file",
    "models": "a list of entries such as {model: PATH, parameters: {weight: 0.5}}",
    "slices": "a list of entries such as {sources: [{model: PATH, layer_range: [0, 16]}]}",
    "sources": "a list of entries such as {model: PATH, layer_range: [0, 16]}, at least one",
    "layer_range": "[FIRST, END], two whole numbers: the layers from FIRST to END - 1",
    "parameters": "names with their values, such as {density: 0.5, normalize: true}",
    "dtype": "the name of a dtype, such as float32",
    "out_dtype": "the name of a dtype, such as bfloat16",
    "tokenizer_source": "base",
    "granularity": "model, layer or tensor",
    "exponent": "a number",
    "coefficients": "metagpt, or a list of one number per model",
    "coefficients_from": "merged or raw",
    "filter": "a part of tensors' names, such as self_attn, or *",
    "value": "a number, text, true, false, or a list of them",
}
_PARAMETER = "a number, text, true or false; a list of them (a gradient); or a list of {filter, value}"


def _check_scalar(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    raise PydanticCustomError("no_scalar", "no scalar")


def _kind_of_value(value: Any) -> str:
    return "gradient" if isinstance(value, list) else "scalar"


def _kind_of_setting(value: Any) -> str:
    if isinstance(value, dict):
        return "condition"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "conditions"
    return _kind_of_value(value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Scalar = Annotated[Any, AfterValidator(_check_scalar)]
Gradient = Annotated[list[Scalar], Field(min_length=1)]
Value = Annotated[
    Annotated[Scalar, Tag("scalar")] | Annotated[Gradient, Tag("gradient")],
    Discriminator(_kind_of_value),
]


class Condition(_Strict):
    """A value for the tensors whose names contain ``filter``."""

    value: Value
    filter: str | None = None


Setting = Annotated[
    Annotated[Scalar, Tag("scalar")]
    | Annotated[Gradient, Tag("gradient")]
    | Annotated[Condition, Tag("condition")]
    | Annotated[list[Condition], Tag("conditions")],
    Discriminator(_kind_of_setting),
]
Settings = dict[str, Setting]


class ModelEntry(_Strict):
    """One model of ``models``."""

    model: str
    parameters: Settings | None = None


class SourceEntry(_Strict):
    """Some layers of a model."""

    model: str
    layer_range: Annotated[list[int], Field(min_length=2, max_length=2)]
    parameters: Settings | None = None


class SliceEntry(_Strict):
    """Layers of the output, from as many layers of each source."""

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: str | None = None
    parameters: Settings | None = None


class RecipeDocument(_Strict):
    """A whole recipe."""

    merge_method: str
    base_model: str | None = None
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    parameters: Settings | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Literal["base"] | None = None
    granularity: str | None = None
    exponent: Scalar | None = None
    coefficients: Value | None = None
    coefficients_from: str | None = None


_TAGS = {"scalar", "gradient", "condition", "conditions"}
_MODELS: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): RecipeDocument,
    ("models",): ModelEntry,
    ("slices",): SliceEntry,
    ("slices", "sources"): SourceEntry,
}


def validate(node: YamlNode, where: str, known_parameters: Iterable[str] = ()) -> RecipeDocument:
    """Return the recipe of a YAML document.

    Args:
        node: the document.
        where: the file, for messages.
        known_parameters: names that belong under ``parameters``, to say so when they are elsewhere.

    Raises:
        RecipeError: a key is unknown or missing, or holds something else; the first one by line.
    """
    if not isinstance(node.value, dict):
        expected = "merge_method, models and their parameters"
        where = f"{where}:{node.line}"
        raise RecipeError("is not a recipe", where=where, got=brief(node.plain()), expected=expected)
    try:
        return RecipeDocument.model_validate(node.plain())
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        first = min(details, key=lambda each: (node.line_of(*_path(node, each)), each["type"] != "extra_forbidden"))
        raise _explain(node, where, first, known_parameters) from error


def _path(node: YamlNode, details: ErrorDetails) -> tuple[str | int, ...]:
    """Return where an error is, without the names of pydantic's alternatives."""
    path: list[str | int] = []
    for step in details["loc"]:
        if isinstance(step, str) and step in _TAGS and not (isinstance(node.value, dict) and step in node.value):
            continue
        path.append(step)
        if isinstance(node.value, dict) and step in node.value:
            node = node.value[str(step)]
        elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
    return tuple(path)


def _explain(node: YamlNode, where: str, details: ErrorDetails, known_parameters: Iterable[str]) -> RecipeError:
    path = _path(node, details)
    where = f"{where}:{node.line_of(*path)}"
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    if details["type"] == "extra_forbidden":
        return _unknown_key(str(path[-1]), _model_at(path[:-1]), where, known_parameters)
    if details["type"] == "missing":
        return RecipeError(f"{printable(key)} is missing", where=where, expected=_HOLDS.get(key))
    is_parameter = "parameters" in path[:-1] and key not in {"filter", "value"}
    if key == "tokenizer_source":
        hint = REFUSED["tokenizer"]
        return RecipeError(
            f"{key} cannot be used", where=where, got=brief(details["input"]), expected="base", hint=hint
        )
    expected = _PARAMETER if is_parameter else _HOLDS.get(key, details["msg"])
    return RecipeError(f"{printable(key)} cannot be used", where=where, got=brief(details["input"]), expected=expected)


def _model_at(path: tuple[str | int, ...]) -> type[BaseModel]:
    names = tuple(step for step in path if isinstance(step, str))
    return _MODELS.get(names, Condition)


def _unknown_key(key: str, model: type[BaseModel], where: str, known_parameters: Iterable[str]) -> RecipeError:
    if key in REFUSED:
        return RecipeError(f"{key} is not supported", where=where, hint=REFUSED[key])
    allowed = list(model.model_fields)
    if key in set(known_parameters) and "parameters" in allowed:
        hint: str | None = f"put {key} under parameters:"
    else:
        hint = suggestion(key, allowed)
    return RecipeError(f"unknown key {brief(key)}", where=where, expected="one of " + ", ".join(allowed), hint=hint)
