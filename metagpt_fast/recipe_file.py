"""A recipe from a YAML file: mergekit's configuration language, checked and frozen, with the line of every setting.

``load_recipe`` knows no method and opens no checkpoint. It decides what is written: the models' paths, which slices,
which settings in which scope. What a setting is worth for a tensor is in :mod:`metagpt_fast.recipe_parameters`, which
tensors there are in :mod:`metagpt_fast.recipe_tensors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dtypes import DType, parse_output_dtype
from .errors import RecipeError
from .untrusted import brief

if TYPE_CHECKING:
    from .recipe_yaml import YamlNode

GRANULARITIES = ("model", "layer", "tensor")
# Keys of our own at the top level that stand for parameters of the method.
_SHORTHANDS = ("exponent", "coefficients", "coefficients_from")
_CURRENT_FOLDER = Path()
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a setting.

    Attributes:
        values: one value, or the support points of a gradient over the layers.
        is_gradient: whether it was written as a list.
        filter: the part of a tensor's name that it is for; None or ``*`` for all tensors.
        line: where it is written.
    """

    values: tuple[Value, ...]
    is_gradient: bool
    filter: str | None
    line: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What a scope says about a parameter: the first entry that is for a tensor counts."""

    entries: tuple[Entry, ...]
    line: int


Settings = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """Layers of one model.

    Attributes:
        model: index of the model in ``RecipeFile.models``.
        layers: (first, end), or None for all of the model.
        parameters: this model's settings.
        line: where it is written.
    """

    model: int
    layers: tuple[int, int] | None
    parameters: Settings
    line: int


@dataclass(frozen=True, slots=True)
class RecipeSlice:
    """Layers of the output, merged from as many layers of every source.

    Attributes:
        sources: at least one.
        base: the base model's index in ``RecipeFile.models``: the slice's own, else the recipe's; or None.
        parameters: the slice's settings.
        line: where it is written.
    """

    sources: tuple[RecipeSource, ...]
    base: int | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class RecipeFile:
    """A recipe, as written.

    Attributes:
        path: the file.
        text: all of it.
        merge_method: the method's name.
        models: every model that the recipe names, once each, as given: sources, slice by slice, and bases.
        base: the top-level base model's index in ``models``, or None.
        slices: what the output consists of; with ``models:`` in the recipe one slice of whole models.
        parameters: the top level's settings.
        dtype: what inputs are rounded to before they are merged in mergekit, or None.
        out_dtype: what the output is rounded to, or None for ``dtype``, or the inputs'.
        granularity: over what coefficients are solved, or None for the method's own.
        coefficients: given coefficients, one per model that is not the base or one for all, or None.
        wants_base_tokenizer: whether the recipe asks for the base's tokenizer (``tokenizer_source: base``).
        lines: the lines of the top level's keys.
    """

    path: Path
    text: str
    merge_method: str
    models: tuple[Path, ...]
    base: int | None
    slices: tuple[RecipeSlice, ...]
    parameters: Settings = field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: DType | None = None
    granularity: str | None = None
    coefficients: tuple[float, ...] | None = None
    wants_base_tokenizer: bool = False
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_sliced(self) -> bool:
        """Return whether layers are chosen and renumbered, and not all of every model merged."""
        return self.slices[0].sources[0].layers is not None

    def where(self, line: int) -> str:
        """Return ``FILE:LINE``."""
        return f"{self.path}:{line}"

    def where_of(self, key: str) -> str:
        """Return ``FILE:LINE`` of a key of the top level, or the file if it is not there."""
        return self.where(self.lines[key]) if key in self.lines else str(self.path)


def all_settings(recipe: RecipeFile, slices: Iterable[RecipeSlice]) -> list[Settings]:
    """Return the settings of every scope: the top level's, the slices', the sources'."""
    slices = tuple(slices)
    sources = [source for each in slices for source in each.sources]
    return [recipe.parameters, *(each.parameters for each in slices), *(source.parameters for source in sources)]


def load_recipe(path: str | Path, known_parameters: Iterable[str] = ()) -> RecipeFile:
    """Read a recipe.

    Args:
        path: the YAML file. Paths of models in it are relative to the current folder, as in mergekit.
        known_parameters: names of methods' parameters, to say where a misplaced one belongs.

    Raises:
        RecipeError: the file cannot be read, is no YAML or no recipe, asks for what is not supported, or names a model
            that is not there. The message names the line.
    """
    from .recipe_yaml import read_text

    path = Path(path)
    return parse_recipe(read_text(path), path, known_parameters)


def parse_recipe(
    text: str, path: Path, known_parameters: Iterable[str] = (), *, folder: Path = _CURRENT_FOLDER
) -> RecipeFile:
    """Read a recipe's text; as :func:`load_recipe`, with the folder that models' paths are relative to."""
    # PyYAML and pydantic take 0.1 s to import: only who reads a recipe pays for it.
    from .recipe_schema import validate
    from .recipe_yaml import parse_yaml

    node = parse_yaml(text, path)
    return _Loader(path, text, node, validate(node, str(path), known_parameters).model_dump(), folder).load()


class _Loader:
    """From the validated document to the frozen description."""

    def __init__(self, path: Path, text: str, node: YamlNode, document: dict[str, Any], folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._text = text
        self._node = node
        self._document = document
        self._models: dict[str, int] = {}  # real path → index
        self._paths: list[Path] = []

    def load(self) -> RecipeFile:
        document = self._document
        is_sliced = document["slices"] is not None
        if is_sliced == (document["models"] is not None):
            got = "both" if is_sliced else "neither"
            where = self._where("slices")
            raise RecipeError("models or slices", where=where, got=got, expected="exactly one of them")
        parameters = dict(self._settings(document["parameters"], "parameters"))
        granularity, coefficients = self._own_keys(parameters)
        slices = [self._slice(i) for i in range(len(document["slices"]))] if is_sliced else [self._whole_models()]
        base = self._model(document["base_model"], "base_model")
        return RecipeFile(
            path=self._path,
            text=self._text,
            merge_method=document["merge_method"],
            models=tuple(self._paths),
            base=base,
            slices=tuple(each if each.base is not None else replace(each, base=base) for each in slices),
            parameters=parameters,
            dtype=self._dtype("dtype"),
            out_dtype=self._dtype("out_dtype"),
            granularity=granularity,
            coefficients=coefficients,
            wants_base_tokenizer=document["tokenizer_source"] == "base",
            lines=self._node.key_lines,
        )

    def _where(self, *path: str | int) -> str:
        return f"{self._path}:{self._node.line_of(*path)}"

    def _whole_models(self) -> RecipeSlice:
        sources = []
        for i, entry in enumerate(self._document["models"]):
            sources.append(self._source(entry, None, "models", i))
        return self._checked(RecipeSlice(tuple(sources), None, {}, self._node.line_of("models")))

    def _slice(self, index: int) -> RecipeSlice:
        entry = self._document["slices"][index]
        sources = []
        for i, source in enumerate(entry["sources"]):
            path = ("slices", index, "sources", i)
            first, end = source["layer_range"]
            if not 0 <= first < end:
                raise RecipeError(
                    "layer_range",
                    where=self._where(*path, "layer_range"),
                    got=brief([first, end]),
                    expected="[FIRST, END] with 0 <= FIRST < END: the layers from FIRST to END - 1",
                )
            sources.append(self._source(source, (first, end), *path))
        num_layers = [end - first for first, end in (s.layers for s in sources if s.layers is not None)]
        if len(set(num_layers)) > 1:
            raise RecipeError(
                "the sources of a slice have different numbers of layers",
                where=self._where("slices", index),
                got=", ".join(map(str, num_layers)),
                expected="as many of each source",
            )
        base = self._model(entry["base_model"], "slices", index, "base_model")
        parameters = self._settings(entry["parameters"], "slices", index, "parameters")
        return self._checked(RecipeSlice(tuple(sources), base, parameters, self._node.line_of("slices", index)))

    def _source(self, entry: Any, layers: tuple[int, int] | None, *path: str | int) -> RecipeSource:
        model = self._model(entry["model"], *path, "model")
        assert model is not None  # the schema requires it
        settings = self._settings(entry["parameters"], *path, "parameters")
        return RecipeSource(model, layers, settings, self._node.line_of(*path))

    def _checked(self, each: RecipeSlice) -> RecipeSlice:
        """Return the slice; raises RecipeError if a model is in it twice."""
        lines: dict[int, int] = {}
        for source in each.sources:
            if source.model in lines:
                raise RecipeError(
                    "the same model twice in one slice" if source.layers else "the same model twice",
                    where=f"{self._path}:{source.line}",
                    got=f"{self._paths[source.model]}, also in line {lines[source.model]}",
                    expected="each model once",
                    hint="give it the sum of the weights",
                )
            lines[source.model] = source.line
        return each

    def _model(self, text: str | None, *path: str | int) -> int | None:
        """Return the index of the model with this path, or None without one; two paths of one folder are one model."""
        if text is None:
            return None
        found = self._folder / text
        if not text or not _exists(found):
            raise self._no_model(text, *path)
        identity = os.path.realpath(found)
        if identity not in self._models:
            self._models[identity] = len(self._paths)
            self._paths.append(found)
        return self._models[identity]

    def _no_model(self, text: str, *path: str | int) -> RecipeError:
        where = self._where(*path)
        if "+" in text:
            hint = "merge the adapter into its model first (peft: merge_and_unload, then save_pretrained)"
            return RecipeError("LoRA adapters are not supported in recipes", where=where, got=brief(text), hint=hint)
        if "@" in text:
            name, _, revision = text.partition("@")
            hint = f"download it first: hf download {name} --revision {revision} --local-dir FOLDER"
            what = "revisions of models on the hub are not supported"
            return RecipeError(what, where=where, got=brief(text), expected="a folder or file", hint=hint)
        hint = "paths are relative to the current folder"
        if _HUB_ID.fullmatch(text):
            hint += f"; download a model of the Hugging Face hub first: hf download {text} --local-dir FOLDER"
        return RecipeError("model does not exist", where=where, got=brief(text), hint=hint)

    def _settings(self, settings: Mapping[str, Any] | None, *path: str | int) -> dict[str, Setting]:
        return {name: self._setting(value, *path, name) for name, value in (settings or {}).items()}

    def _setting(self, value: Any, *path: str | int) -> Setting:
        line = self._node.line_of(*path)
        if isinstance(value, dict):
            return Setting((_entry(value["value"], value["filter"], line),), line)
        if isinstance(value, list) and isinstance(value[0], dict):
            lines = [self._node.line_of(*path, i) for i in range(len(value))]
            entries = [_entry(each["value"], each["filter"], at) for each, at in zip(value, lines, strict=True)]
            return Setting(tuple(entries), line)
        return Setting((_entry(value, None, line),), line)

    def _own_keys(self, parameters: dict[str, Setting]) -> tuple[str | None, tuple[float, ...] | None]:
        """Move our own keys to where they belong; returns the granularity and the given coefficients."""
        written = {"granularity": self._document["granularity"]}
        written.update({name: self._document[name] for name in _SHORTHANDS})
        for name, value in written.items():
            if value is not None and name in parameters:
                line = parameters[name].line
                got = f"also in line {line}"
                raise RecipeError(f"{name} is there twice", where=self._where(name), got=got, expected="it once")
            if value is not None:
                parameters[name] = self._setting(value, name)
        granularity = parameters.pop("granularity", None)
        coefficients = parameters.get("coefficients")
        numbers = None if coefficients is None else _numbers(coefficients)
        if numbers is not None:
            del parameters["coefficients"]
        return None if granularity is None else self._granularity(granularity), numbers

    def _granularity(self, setting: Setting) -> str:
        value = setting.entries[0].values[0]
        is_one = len(setting.entries) == 1 and not setting.entries[0].is_gradient and setting.entries[0].filter is None
        if not is_one or value not in GRANULARITIES:
            raise RecipeError(
                "unknown granularity",
                where=f"{self._path}:{setting.line}",
                got=brief(value) if is_one else "several values",
                expected=", ".join(GRANULARITIES),
            )
        return str(value)

    def _dtype(self, key: str) -> DType | None:
        name = self._document[key]
        if name is None:
            return None
        try:
            return parse_output_dtype(name.removeprefix("torch."))
        except RecipeError as error:
            expected = "float32, bfloat16, float16 or float64"
            raise RecipeError(error.what, where=self._where(key), got=brief(name), expected=expected) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a NUL in it
        return False


def _entry(value: Any, condition: str | None, line: int) -> Entry:
    is_gradient = isinstance(value, list)
    return Entry(tuple(value) if is_gradient else (value,), is_gradient, condition, line)


def _numbers(setting: Setting) -> tuple[float, ...] | None:
    """Return the numbers of a setting that is one list of numbers, or one number; else None."""
    values = setting.entries[0].values
    if len(setting.entries) > 1 or setting.entries[0].filter is not None:
        return None
    numbers = []
    for value in values:
        try:
            numbers.append(float(value))
        except (ValueError, OverflowError):
            return None
        if isinstance(value, bool):
            return None
    return tuple(numbers)
