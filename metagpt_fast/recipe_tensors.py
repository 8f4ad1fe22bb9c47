"""From a recipe and the checkpoints' headers to every tensor of the output: its inputs, its base, its parameters.

With ``models:`` the output has the tensors of the models, which all have to have the same. With ``slices:`` layers are
numbered anew, in the order of the slices; tensors before the layers come from the first slice's models and tensors
after them from the last one's, with the settings of that slice (``is_before_layers`` says which is which).

Nothing is lost in silence: a tensor that would be is an error, other than the layers that slices leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .checkpoint import Checkpoint, TensorSource
from .errors import PlanError, RecipeError
from .layer_names import LayerName, is_before_layers, split_name
from .methods import Method
from .recipe_file import RecipeFile, RecipeSlice, RecipeSource, all_settings
from .recipe_parameters import ParameterResolver, Values, layer_fraction, with_coefficients
from .untrusted import brief

MAX_NUM_LAYERS = 10_000

# The tensors of each layer of a model, by what follows the layer's number in their names.
Layers = dict[int, dict[str, TensorSource]]


@dataclass(frozen=True, slots=True)
class RecipeInput:
    """One input of an output tensor.

    Attributes:
        model: index of the model in ``RecipeFile.models``.
        source: where the bytes are.
        parameters: the model's own values by the parameters' names; empty for a base that task vectors are from.
    """

    model: int
    source: TensorSource
    parameters: Values


@dataclass(frozen=True, slots=True)
class RecipeTensor:
    """One tensor of the output.

    Attributes:
        name: its name in the output.
        inputs: what it is merged from, in the order of the recipe; a base that the recipe does not list is the last.
        base: which of the inputs is the base, or None.
        parameters: the values that are the same for all models, by the parameters' names.
        t: where in its slice it is, for gradients.
    """

    name: str
    inputs: tuple[RecipeInput, ...]
    base: int | None
    parameters: Values
    t: float


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the output comes from: the slice's first source."""

    model: int
    layer: int


@dataclass(frozen=True)
class RecipeTensors:
    """What a recipe makes.

    Attributes:
        tensors: the output's, each once. Equal parameters are one object.
        layers: the origin of each layer of the output if the recipe has slices, which renumber layers; else empty.
        warnings: settings that have no effect, in sentences.
    """

    tensors: tuple[RecipeTensor, ...]
    layers: tuple[LayerOrigin, ...]
    warnings: tuple[str, ...]

    @property
    def num_layers(self) -> int | None:
        """Return the output's number of layers, or None where it is the models' own."""
        return len(self.layers) or None


def resolve_tensors(recipe: RecipeFile, method: type[Method], checkpoints: Sequence[Checkpoint]) -> RecipeTensors:
    """Return every tensor of the output.

    Args:
        recipe: what is asked for.
        method: the class of the method that it names.
        checkpoints: one for each of ``recipe.models``.

    Raises:
        RecipeError: a setting, a range of layers or a base cannot be used.
        PlanError: the checkpoints cannot be merged so: a tensor is missing, or would be lost.
    """
    return _Resolver(recipe, method, checkpoints).resolve()


class _Resolver:
    def __init__(self, recipe: RecipeFile, method: type[Method], checkpoints: Sequence[Checkpoint]) -> None:
        self._recipe = recipe
        self._checkpoints = checkpoints
        slices = tuple(_with_base(recipe, method, each) for each in recipe.slices)
        if method.base == "ignored":
            slices = tuple(replace(each, base=None) for each in slices)
        self._bases = [_base_position(each) for each in slices]
        compares = method.base in {"required", "optional"}
        has_own = [
            [not compares or position != base for position in range(len(each.sources))]
            for each, base in zip(slices, self._bases, strict=True)
        ]
        specs = method.specs()
        self._slices = with_coefficients(recipe, slices, method.name, specs, has_own)
        self._values = ParameterResolver(recipe, self._slices, method.name, specs, has_own)
        self._warnings = self._values.warnings
        if method.base == "ignored" and recipe.base is not None and not recipe.is_sliced:
            self._warn_of_base(method, recipe.base)

    def resolve(self) -> RecipeTensors:
        layers: tuple[LayerOrigin, ...] = ()
        if self._recipe.is_sliced:
            stack, parts = self._stack()
            for each in self._slices:
                self._check_ranges(each, parts)
            self._check_num_layers()
            layers = tuple(self._layers())
            tensors = tuple(self._sliced(stack, parts))
            self._check_nothing_lost(tensors)
        else:
            tensors = tuple(self._whole())
        self._check_filters(tensors)
        return RecipeTensors(tensors, layers, tuple(self._warnings))

    def _warn_of_base(self, method: type[Method], base: int) -> None:
        if all(source.model != base for source in self._slices[0].sources):
            where = self._recipe.where_of("base_model")
            self._warnings.append(
                f"{where}: {method.name} merges the models that are listed; the base gives config and tokenizer only"
            )

    def _tensor(self, index: int, name: str, t: float, sources: Iterable[TensorSource]) -> RecipeTensor:
        inputs = tuple(
            RecipeInput(each.model, source, self._values.of_source(index, position, source.name, t))
            for position, (each, source) in enumerate(zip(self._slices[index].sources, sources, strict=True))
        )
        return RecipeTensor(name, inputs, self._bases[index], self._values.shared(index, name, t), t)

    # Whole models

    def _whole(self) -> Iterator[RecipeTensor]:
        only = self._slices[0]
        members = [self._checkpoints[source.model] for source in only.sources]
        first = members[self._bases[0] or 0]
        for member in members:
            for name in member.tensors:
                if name not in first.tensors:
                    raise _lost(name, member, first)
        num_layers: dict[str, int] = {}
        parts = {name: split_name(name) for name in first.tensors}
        for part in parts.values():
            if part is not None:
                num_layers[part.stack] = max(num_layers.get(part.stack, 0), part.layer + 1)
        for name, part in parts.items():
            sources = [_find(member, name, first) for member in members]
            t = 0.0 if part is None else layer_fraction(part.layer, num_layers[part.stack])
            yield self._tensor(0, name, t, sources)

    # Slices

    def _stack(self) -> tuple[str, list[Layers]]:
        """Return the stack that all layers are of, and the layers of each model; of one in no slice there are none."""
        members = {source.model: source for each in self._slices for source in each.sources}
        stacks: dict[str, Checkpoint] = {}
        parts: list[Layers] = [{} for _ in self._checkpoints]
        for model in members:
            for name, tensor in self._checkpoints[model].tensors.items():
                part = split_name(name)
                if part is not None:
                    stacks.setdefault(part.stack, self._checkpoints[model])
                    self._place(parts[model], part, tensor)
        if len(stacks) != 1:
            got = ", ".join(f"{brief(name)} in {checkpoint.path}" for name, checkpoint in list(stacks.items())[:4])
            raise PlanError(
                "slices need one stack of layers, of the same name in all models",
                where=self._recipe.where_of("slices"),
                got=got or "no layers",
                expected="names such as model.layers.0.mlp.up_proj.weight",
                hint="merge whole models with models:" if len(stacks) > 1 else None,
            )
        for model, source in members.items():
            self._check_complete(parts[model], model, source)
        return next(iter(stacks)), parts

    def _place(self, layers: Layers, part: LayerName, tensor: TensorSource) -> None:
        other = layers.setdefault(part.layer, {}).setdefault(part.rest, tensor)
        if other is not tensor:  # layers.1.x and layers.01.x
            what = f"the tensors {brief(other.name)} and {brief(tensor.name)} are of one layer"
            raise PlanError(what, where=tensor.path, expected="each tensor once")

    def _check_complete(self, layers: Layers, model: int, source: RecipeSource) -> None:
        missing = next((i for i in range(len(layers)) if i not in layers), None)
        if missing is not None:
            raise PlanError(
                f"has no layer {missing}, but a layer {max(layers)}",
                where=self._checkpoints[model].path,
                expected="layers numbered from 0 without a gap",
                hint=f"the recipe takes layers of it in {self._recipe.where(source.line)}",
            )

    def _check_num_layers(self) -> None:
        """Raise RecipeError for more layers than any model has: a short recipe can ask for billions of tensors."""
        num_layers = sum(end - first for first, end in (_range(each.sources[0]) for each in self._slices))
        if num_layers > MAX_NUM_LAYERS:
            where = self._recipe.where_of("slices")
            raise RecipeError("too many layers", where=where, got=num_layers, expected=f"at most {MAX_NUM_LAYERS}")

    def _layers(self) -> Iterator[LayerOrigin]:
        for each in self._slices:
            first, end = _range(each.sources[0])
            yield from map(partial(LayerOrigin, each.sources[0].model), range(first, end))

    def _sliced(self, stack: str, parts: list[Layers]) -> Iterator[RecipeTensor]:
        yield from self._outside(0, before=True)
        num_layers = 0
        for index, each in enumerate(self._slices):
            starts = [_range(source)[0] for source in each.sources]
            first, end = _range(each.sources[0])
            for i in range(end - first):
                layers = [parts[source.model][start + i] for source, start in zip(each.sources, starts, strict=True)]
                self._check_same(each, layers, starts, i)
                t = layer_fraction(i, end - first)
                for rest in layers[0]:
                    name = f"{stack}{num_layers}{rest}"
                    yield self._tensor(index, name, t, [layer[rest] for layer in layers])
                num_layers += 1
        yield from self._outside(len(self._slices) - 1, before=False)

    def _check_ranges(self, each: RecipeSlice, parts: list[Layers]) -> None:
        for source in each.sources:
            first, end = _range(source)
            if end > len(parts[source.model]):
                raise RecipeError(
                    "layer_range",
                    where=self._recipe.where(source.line),
                    got=f"[{first}, {end}]",
                    expected=f"layers from 0 to {len(parts[source.model])}, the number of layers of "
                    f"{self._recipe.models[source.model]}",
                )

    def _check_same(
        self, each: RecipeSlice, layers: Sequence[dict[str, TensorSource]], starts: Sequence[int], i: int
    ) -> None:
        """Raise PlanError unless the layers that are merged with each other have the same tensors."""
        for position in range(1, len(layers)):
            if layers[0].keys() == layers[position].keys():
                continue
            here, there = (0, position) if layers[0].keys() - layers[position].keys() else (position, 0)
            name = next(tensor.name for rest, tensor in layers[here].items() if rest not in layers[there])
            label = self._checkpoints[each.sources[there].model].label
            raise PlanError(
                f"tensor {brief(name)} has no counterpart in layer {starts[there] + i} of {label}",
                where=self._checkpoints[each.sources[here].model].path,
                got=f"{len(layers[here])} tensors in one layer, {len(layers[there])} in the other",
                expected="the same tensors in layers that are merged",
                hint=f"the slice is in {self._recipe.where(each.line)}",
            )

    def _outside(self, index: int, *, before: bool) -> Iterator[RecipeTensor]:
        """Yield the tensors before or after the layers, from the models of the slice."""
        members = [self._checkpoints[source.model] for source in self._slices[index].sources]
        names = dict.fromkeys(name for member in members for name in member.tensors)
        for name in names:
            if split_name(name) is None and is_before_layers(name) == before:
                yield self._tensor(index, name, 0.0, [_find(member, name, None) for member in members])

    def _check_nothing_lost(self, tensors: Iterable[RecipeTensor]) -> None:
        outputs = {tensor.name for tensor in tensors}
        for source in (source for each in self._slices for source in each.sources):
            checkpoint = self._checkpoints[source.model]
            for name in checkpoint.tensors:
                if name not in outputs and split_name(name) is None:
                    side, slice_ = ("before", "first") if is_before_layers(name) else ("after", "last")
                    raise PlanError(
                        f"tensor {brief(name)} of {checkpoint.label} would be lost",
                        where=checkpoint.path,
                        got=f"none of that name in the models of the {slice_} slice",
                        expected=f"it there, where the tensors {side} the layers are taken from",
                        hint=_tied_hint(name),
                    )

    def _check_filters(self, tensors: Iterable[RecipeTensor]) -> None:
        """Warn of filters that find nothing: they are misspelt, or for another architecture."""
        names = {name for tensor in tensors for name in (tensor.name, *(i.source.name for i in tensor.inputs))}
        text = "\n".join(names)
        for scope in all_settings(self._recipe, self._slices):
            for setting in scope.values():
                for entry in setting.entries:
                    if entry.filter not in {None, "*"} and str(entry.filter) not in text:
                        where = self._recipe.where(entry.line)
                        self._warnings.append(f"{where}: the filter {brief(entry.filter)} is in no tensor's name")


def _with_base(recipe: RecipeFile, method: type[Method], each: RecipeSlice) -> RecipeSlice:
    """Return the slice with its base among the sources, as the method needs it."""
    if method.base == "ignored":
        return each
    where = recipe.where_of("merge_method")
    if each.base is None:
        if method.base == "required":
            hint = "add base_model: PATH to the recipe"
            raise RecipeError(f"{method.name} needs a base_model", where=where, hint=hint)
        return each
    if any(source.model == each.base for source in each.sources):
        return each
    if recipe.is_sliced:
        raise RecipeError(
            f"the base model is not among the sources of the slice, where {method.name} needs it",
            where=recipe.where(each.line),
            got=", ".join(str(recipe.models[source.model]) for source in each.sources),
            expected=f"{recipe.models[each.base]} with its layer_range, too",
        )
    added = RecipeSource(each.base, None, {}, recipe.lines.get("base_model", each.line))
    return replace(each, sources=(*each.sources, added))


def _base_position(each: RecipeSlice) -> int | None:
    return next((i for i, source in enumerate(each.sources) if source.model == each.base), None)


def _range(source: RecipeSource) -> tuple[int, int]:
    assert source.layers is not None  # every source of a sliced recipe has one
    return source.layers


def _find(member: Checkpoint, name: str, first: Checkpoint | None) -> TensorSource:
    found = member.tensors.get(name)
    if found is None:
        owner = "" if first is None else f", which {first.label} has"
        raise PlanError(
            f"tensor {brief(name)} is missing from {member.label}{owner}",
            where=member.path,
            got=f"{len(member.tensors)} tensors",
            expected="the same tensors in all models that are merged",
            hint=_tied_hint(name),
        )
    return found


def _lost(name: str, member: Checkpoint, first: Checkpoint) -> PlanError:
    return PlanError(
        f"tensor {brief(name)} of {member.label} would be lost: {first.label} has none of that name",
        where=member.path,
        got=f"{len(member.tensors)} tensors, where {first.label} has {len(first.tensors)}",
        expected="the same tensors in all models that are merged",
        hint=_tied_hint(name),
    )


def _tied_hint(name: str) -> str | None:
    if "lm_head" not in name:
        return None
    return "a model without it shares it with its embeddings: save both models with, or without, tie_word_embeddings"
