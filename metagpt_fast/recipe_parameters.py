"""What the settings of a recipe are worth: for one tensor, at one place among the layers, for one model.

The rules are mergekit's (0.1.5):

- Scopes are asked from the narrowest to the widest: the source (for what each model has a value of its own), the slice,
  the top level, the method's default.
- In a scope the first entry counts whose filter is absent, ``*``, or part of the tensor's name; if there is none, the
  next scope is asked. Values per model go by the name of the input tensor, shared ones by the output's.
- A list is a gradient over the layers of a slice: t = i / (L - 1) for layer i of L, 1 for the only one, 0 outside of
  the layers. Numbers are interpolated linearly; of n texts or booleans the one with index int(t (n - 1)) is taken.
- Texts that are numbers are numbers where the parameter is one: YAML takes ``1e-5`` for a text.

Unlike there, a parameter that the method does not have, or that cannot take effect where it is, is an error, and so is
a boolean in place of a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from .errors import RecipeError, suggestion
from .methods.parameters import ParameterSpec, checked
from .recipe_file import Entry, RecipeFile, RecipeSlice, RecipeSource, Setting, Settings, all_settings
from .untrusted import brief

# mergekit takes it for the masks of some methods; it changes nothing there either.
WITHOUT_EFFECT = frozenset({"int8_mask"})
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})

Values = Mapping[str, Any]


def interpolate(values: Sequence[float], t: float) -> float:
    """Return the value at ``t`` of the polyline through ``values``, which are evenly spaced over 0 <= t <= 1."""
    position = t * (len(values) - 1)
    lower = min(int(position), len(values) - 1)
    upper = min(lower + 1, len(values) - 1)
    fraction = position - lower
    return (1 - fraction) * values[lower] + fraction * values[upper]


def layer_fraction(index: int, num_layers: int) -> float:
    """Return t of layer ``index`` of the ``num_layers`` layers of a slice."""
    return index / (num_layers - 1) if num_layers > 1 else 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry with values of the parameter's type."""

    values: tuple[Any, ...]
    filter: str | None
    where: str

    def applies_to(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True, slots=True)
class _Chain:
    """The scopes that say something about a parameter, the narrowest first."""

    spec: ParameterSpec
    scopes: tuple[tuple[_Entry, ...], ...]
    is_required: bool
    depends_on_name: bool

    def value(self, name: str, t: float) -> Any:
        """Return the value for a tensor, or the default; raises RecipeError without either."""
        for entries in self.scopes:
            for entry in entries:
                if entry.applies_to(name):
                    return _at(self.spec, entry, t)
        if self.is_required:
            raise KeyError(self.spec.name)
        return self.spec.default


class ParameterResolver:
    """The values of a method's parameters for every tensor of a recipe.

    Args:
        recipe: for the file's name, the top level's settings and given coefficients.
        slices: the recipe's slices, with the sources that take part.
        method: the method's name, for messages.
        specs: its parameters by their names in recipes.
        has_own: per slice and source, whether the source has values of its own: not a base that task vectors are from.

    Raises:
        RecipeError: a setting is for no parameter of the method, is where it has no effect, or has a value that cannot
            be used.
    """

    def __init__(
        self,
        recipe: RecipeFile,
        slices: Sequence[RecipeSlice],
        method: str,
        specs: Mapping[str, ParameterSpec],
        has_own: Sequence[Sequence[bool]],
    ) -> None:
        self._recipe = recipe
        self._method = method
        self._specs = specs
        self._slices = slices
        self._has_own = has_own
        self._by_place: dict[tuple[int, float], Values] = {}
        self._by_content: dict[tuple[Any, ...], Values] = {}
        self._converted: dict[tuple[str, int], tuple[_Entry, ...]] = {}
        self.warnings: list[str] = []
        self._computes_weights = self._check_weights()
        for index, each in enumerate(slices):
            self._check_slice(each, has_own[index])
        self._check_names(recipe.parameters)
        top = dict(recipe.parameters)
        self._shared = [self._chains((each.parameters, top), per_model=False) for each in slices]
        self._own = [
            [self._of_source(index, position, top) for position in range(len(each.sources))]
            for index, each in enumerate(slices)
        ]

    def shared(self, index: int, name: str, t: float) -> Values:
        """Return the values that are the same for all models, for the output tensor ``name`` of slice ``index``."""
        return self._values(self._shared[index], name, t, self._slices[index].line, None)

    def of_source(self, index: int, position: int, name: str, t: float) -> Values:
        """Return a model's own values, for its tensor ``name``; empty for a base that has none."""
        source = self._slices[index].sources[position]
        return self._values(self._own[index][position], name, t, source.line, source)

    def _values(
        self, chains: tuple[_Chain, ...], name: str, t: float, line: int, source: RecipeSource | None
    ) -> Values:
        # A model may have 100,000 tensors, but there are few different settings: equal ones are one object.
        place = None if any(chain.depends_on_name for chain in chains) else (id(chains), t)
        if place is not None and place in self._by_place:
            return self._by_place[place]
        try:
            values = {chain.spec.name: chain.value(name, t) for chain in chains}
        except KeyError as error:
            raise self._missing(str(error.args[0]), name, line, source) from None
        found = self._by_content.setdefault(tuple(values.items()), MappingProxyType(values))
        if place is not None:
            self._by_place[place] = found
        return found

    def _of_source(self, index: int, position: int, top: Settings) -> tuple[_Chain, ...]:
        each = self._slices[index]
        if not self._has_own[index][position]:
            return ()
        return self._chains((each.sources[position].parameters, each.parameters, top), per_model=True)

    def _chains(self, scopes: Iterable[Settings], *, per_model: bool) -> tuple[_Chain, ...]:
        scopes = tuple(scopes)
        chains = []
        for name, spec in self._specs.items():
            if spec.per_model == per_model:
                settings = [scope[name] for scope in scopes if name in scope]
                entries = tuple(self._entries(spec, setting) for setting in settings)
                has_filters = any(entry.filter not in {None, "*"} for scope in entries for entry in scope)
                is_required = spec.required and not (name == "weight" and self._computes_weights)
                chains.append(_Chain(spec, entries, is_required, has_filters))
        return tuple(chains)

    def _entries(self, spec: ParameterSpec, setting: Setting) -> tuple[_Entry, ...]:
        key = (spec.name, id(setting))
        if key not in self._converted:
            self._converted[key] = tuple(self._entry(spec, entry) for entry in setting.entries)
        return self._converted[key]

    def _entry(self, spec: ParameterSpec, entry: Entry) -> _Entry:
        where = self._recipe.where(entry.line)
        return _Entry(tuple(convert(self._method, spec, value, where) for value in entry.values), entry.filter, where)

    def _check_weights(self) -> bool:
        """Return whether weights are computed, so that none have to be given; raises RecipeError if they are, too."""
        every = all_settings(self._recipe, self._slices)
        settings = [scope.get("coefficients") for scope in every]
        spec = self._specs.get("coefficients")
        entries = [entry for setting in settings if setting is not None for entry in setting.entries]
        if spec is None or all(value == spec.default for entry in entries for value in entry.values):
            return False
        for scope in every:
            if "weight" in scope:
                raise RecipeError(
                    "weights are given and asked for",
                    where=self._recipe.where(scope["weight"].line),
                    got=f"weight, and coefficients in line {entries[0].line}",
                    expected="one of them",
                )
        return True

    def _check_slice(self, each: RecipeSlice, has_own: Sequence[bool]) -> None:
        self._check_names(each.parameters)
        for source, owns in zip(each.sources, has_own, strict=True):
            self._check_names(source.parameters)
            for name, setting in source.parameters.items():
                where = self._recipe.where(setting.line)
                if name in self._specs and not self._specs[name].per_model:
                    hint = "put it under the parameters: of the top level or of a slice"
                    raise RecipeError(f"{name} is one value for all models", where=where, hint=hint)
                if name in self._specs and not owns:
                    self.warnings.append(f"{where}: {name} has no effect on the base model")

    def _check_names(self, settings: Settings) -> None:
        for name, setting in settings.items():
            if name not in self._specs and name not in WITHOUT_EFFECT:
                raise self._unknown(name, self._recipe.where(setting.line))

    def _unknown(self, name: str, where: str) -> RecipeError:
        from .methods import METHODS

        owners = [method for method, cls in METHODS.items() if name in cls.specs()]
        hint = suggestion(name, self._specs)
        if owners:
            hint = f"{name} belongs to {', '.join(owners)}"
        elif name == "granularity":
            hint = "it is one for the whole merge: put it at the top level"
        return RecipeError(
            f"{self._method} has no parameter {brief(name)}",
            where=where,
            expected=", ".join(self._specs) or "no parameters",
            hint=hint,
        )

    def _missing(self, name: str, tensor: str, line: int, source: RecipeSource | None) -> RecipeError:
        model = "" if source is None else f" of {self._recipe.models[source.model]}"
        is_anywhere = any(name in scope for scope in all_settings(self._recipe, self._slices))
        return RecipeError(
            f"{self._method} needs a value of {name} for the tensor {brief(tensor)}{model}",
            where=self._recipe.where(line),
            hint=f"add an entry without a filter to {name}" if is_anywhere else f"put {name} under parameters:",
        )


def _at(spec: ParameterSpec, entry: _Entry, t: float) -> Any:
    """Return an entry's value at ``t``."""
    if len(entry.values) == 1:
        return entry.values[0]
    if spec.type not in {int, float}:
        return entry.values[int(t * (len(entry.values) - 1))]
    value = interpolate(entry.values, t)
    if spec.type is float:
        return value
    if value != int(value):
        raise RecipeError(
            f"a gradient of {spec.name} is no whole number at t = {t:g}",
            where=entry.where,
            got=value,
            expected="whole numbers at every layer",
        )
    return int(value)


def convert(method: str, spec: ParameterSpec, value: Any, where: str) -> Any:
    """Return a value of a recipe in the parameter's type.

    Args:
        method: the method's name, for messages.
        spec: the parameter.
        value: a number, text or boolean as YAML gave it.
        where: file and line, for messages.

    Raises:
        RecipeError: it is no value of the type, or out of range.
    """
    converted = value
    if spec.type in {int, float} and isinstance(value, str):
        converted = _number(value)
    elif spec.type is bool and isinstance(value, int | float):
        converted = bool(value) if value in {0, 1} else value
    elif spec.type is bool:
        converted = True if value.lower() in _TRUE else False if value.lower() in _FALSE else value
    try:
        result = checked(method, spec, converted)
    except RecipeError as error:
        what = f"{spec.name} of {method} cannot be used"
        raise RecipeError(what, where=where, got=brief(value), expected=error.expected, hint=error.hint) from error
    return result[0] if spec.per_model else result


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def with_coefficients(
    recipe: RecipeFile,
    slices: Sequence[RecipeSlice],
    method: str,
    specs: Mapping[str, ParameterSpec],
    has_own: Sequence[Sequence[bool]],
) -> tuple[RecipeSlice, ...]:
    """Return the slices with the recipe's given coefficients as the sources' weights.

    Raises:
        RecipeError: the method takes none, weights are given as well, or there are not as many as models.
    """
    if recipe.coefficients is None:
        return tuple(slices)
    where = recipe.where_of("coefficients" if "coefficients" in recipe.lines else "parameters")
    if "weight" not in specs or not specs["weight"].per_model:
        raise RecipeError(f"{method} takes no coefficients", where=where, expected=", ".join(specs) or "no parameters")
    if recipe.is_sliced:
        raise RecipeError("coefficients with slices", where=where, hint="give each source its weight")
    (only,), (owns,) = slices, has_own
    num_models = sum(owns)
    if len(recipe.coefficients) not in {1, num_models}:
        raise RecipeError(
            "number of coefficients",
            where=where,
            got=len(recipe.coefficients),
            expected=f"1 (the same for all) or {num_models} (one per model, in their order, without the base)",
        )
    given = iter(recipe.coefficients if len(recipe.coefficients) > 1 else recipe.coefficients * num_models)
    line = recipe.lines.get("coefficients", only.line)
    sources = []
    for source, is_own in zip(only.sources, owns, strict=True):
        if is_own and "weight" in {*source.parameters, *recipe.parameters}:
            got = "both coefficients and weight"
            raise RecipeError("weights are given twice", where=where, got=got, expected="one of them")
        weight = {"weight": Setting((Entry((next(given),), False, None, line),), line)} if is_own else {}
        sources.append(replace(source, parameters={**source.parameters, **weight}))
    return (replace(only, sources=tuple(sources)),)
