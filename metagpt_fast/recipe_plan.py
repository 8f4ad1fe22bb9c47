"""From a recipe's file to the plan of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .dtypes import is_integer
from .errors import PlanError, RecipeError
from .methods import METHODS, Method
from .plan import Buffer, MergePlan, TensorPlan, layer_of, sort_by_layer
from .plan_checks import check_mergeable, shape_mismatch, unique_labels
from .recipe import Recipe, check_granularity
from .recipe_file import RecipeFile, load_recipe, parse_recipe
from .recipe_methods import MethodMaker, find_recipe_method
from .recipe_tensors import RecipeInput, RecipeTensor, RecipeTensors, resolve_tensors

# What makes text into tokens; equal files mean equal tokens.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_COMPARE_NBYTES = 1 << 20


def plan_recipe(path: str | Path) -> MergePlan:
    """Return what a recipe will do. Reads headers only, writes nothing.

    Raises:
        RecipeError: the recipe cannot be read, or asks for what there is not; it names the line.
        CheckpointError: an input is missing or broken.
        PlanError: the inputs do not fit each other.
    """
    return _plan(load_recipe(path, _known_parameters()))


def plan_recipe_text(text: str, path: Path, folder: Path) -> MergePlan:
    """Return the plan of a recipe whose text is there already; as :func:`plan_recipe`.

    Args:
        text: the recipe.
        path: where it is from, for messages.
        folder: what models' paths in it are relative to.
    """
    return _plan(parse_recipe(text, path, _known_parameters(), folder=folder))


def _known_parameters() -> set[str]:
    return {name for cls in METHODS.values() for name in cls.specs()}


def _plan(recipe: RecipeFile) -> MergePlan:
    method = find_recipe_method(recipe)
    checkpoints = [open_checkpoint(model) for model in recipe.models]
    if recipe.wants_base_tokenizer:
        _check_tokenizers(recipe, checkpoints)
    return _Planner(recipe, method, checkpoints, resolve_tensors(recipe, method, checkpoints)).plan()


class _Planner:
    def __init__(
        self, recipe: RecipeFile, method: type[Method], checkpoints: Sequence[Checkpoint], resolved: RecipeTensors
    ) -> None:
        self._recipe = recipe
        self._method = method
        self._checkpoints = checkpoints
        self._resolved = resolved
        self._maker = MethodMaker(recipe, method)

    def plan(self) -> MergePlan:
        tensors: list[TensorPlan] = []
        buffers: list[Buffer] = []
        for tensor in self._resolved.tensors:
            self._check_shapes(tensor)
            first = tensor.inputs[0].source
            if is_integer(first.dtype):
                others = [(self._labels[i.model], i.source) for i in tensor.inputs[1:]]
                buffers.append(Buffer(first, tuple(others)))
                tensors.append(
                    TensorPlan(tensor.name, first.shape, layer_of(tensor.name), first, (), first.dtype, "copy")
                )
            else:
                tensors.append(self._merged(tensor))
        methods = [each.method for each in tensors if each.method is not None]
        if not methods:
            raise PlanError("there is nothing to merge", where=self._recipe.path, got="integer tensors only")
        out_dtype = self._recipe.out_dtype or self._recipe.dtype
        return MergePlan(
            recipe=Recipe(
                base=self._donor.path,
                models=tuple(self._checkpoints[model].path for model in self._columns),
                method=methods[0],
                granularity=self._granularity(),
                out_dtype=out_dtype,
                text=self._recipe.text,
            ),
            base=self._donor,
            models=tuple(self._checkpoints[model] for model in self._columns),
            labels=tuple(self._labels[model] for model in self._columns),
            tensors=sort_by_layer(tensors),
            buffers=tuple(buffers),
            config_layers=tuple(origin.layer for origin in self._resolved.layers) or None,
            warnings=self._resolved.warnings,
        )

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return unique_labels(self._checkpoints)

    @cached_property
    def _donor(self) -> Checkpoint:
        """Return the checkpoint whose config and tokenizer the output gets."""
        first = self._recipe.slices[0].sources[0].model
        return self._checkpoints[first if self._recipe.base is None else self._recipe.base]

    @cached_property
    def _columns(self) -> list[int]:
        """Return the models that are combined, in the order in which the recipe names them."""
        combined = (i.model for tensor in self._resolved.tensors for i in self._split(tensor)[1])
        return sorted(dict.fromkeys(combined))

    def _split(self, tensor: RecipeTensor) -> tuple[RecipeInput | None, list[RecipeInput]]:
        """Return the base that task vectors are added to, if there is one, and what is combined, in order."""
        inputs = list(tensor.inputs)
        if tensor.base is None or self._method.base == "ignored":
            return None, inputs
        base = inputs.pop(tensor.base)
        return (None, [base, *inputs]) if self._method.base == "model" else (base, inputs)

    def _merged(self, tensor: RecipeTensor) -> TensorPlan:
        base, models = self._split(tensor)
        for each in tensor.inputs:
            check_mergeable(each.source)
        first = models[0].source if base is None else base.source
        return TensorPlan(
            name=tensor.name,
            shape=first.shape,
            layer=layer_of(tensor.name),
            base=None if base is None else base.source,
            models=tuple(each.source for each in models),
            out_dtype=self._recipe.out_dtype or self._recipe.dtype or first.dtype,
            action="merge",
            method=self._maker.method_of(tensor, models),
            columns=tuple(self._columns.index(each.model) for each in models),
        )

    def _granularity(self) -> str:
        wanted = {check_granularity(method, self._recipe.granularity) for method in self._maker.made}
        # Methods whose parameters differ by tensor may differ in what they need: the widest scope has them all.
        return next(each for each in ("model", "layer", "tensor") if each in wanted)

    def _check_shapes(self, tensor: RecipeTensor) -> None:
        first = tensor.inputs[0].source
        for each in tensor.inputs[1:]:
            if each.source.shape != first.shape:
                raise shape_mismatch(first, each.source, self._labels[each.model], None)
            if is_integer(each.source.dtype) != is_integer(first.dtype):
                raise PlanError(
                    f"dtype of tensor {tensor.name!r} in {self._labels[each.model]}",
                    where=each.source.path,
                    got=each.source.dtype.name,
                    expected=f"{first.dtype.name}, as in {first.path}",
                )


def _check_tokenizers(recipe: RecipeFile, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise RecipeError unless every model has the base's tokenizer files."""
    if recipe.base is None:
        raise RecipeError(
            "the base's tokenizer is asked for, and there is no base",
            where=recipe.where_of("tokenizer_source"),
            hint="add base_model, or leave tokenizer_source out: the output gets the first model's tokenizer",
        )
    base = checkpoints[recipe.base]
    for other in checkpoints:
        for name in _TOKENIZER_FILES:
            if not _same_file(base.path / name, other.path / name):
                raise RecipeError(
                    "the models have different tokenizers",
                    where=recipe.where_of("tokenizer_source"),
                    got=f"another {name} in {other.path} than in {base.path}",
                    expected="the same tokenizer in all models: rows of the embeddings are not moved",
                    hint="leave tokenizer_source out if the tokens that both have are numbered alike",
                )


def _same_file(a: Path, b: Path) -> bool:
    if not a.is_file() or not b.is_file():
        return a.is_file() == b.is_file()
    with a.open("rb") as first, b.open("rb") as second:
        while chunk := first.read(_COMPARE_NBYTES):
            if chunk != second.read(len(chunk)):
                return False
        return not second.read(1)
