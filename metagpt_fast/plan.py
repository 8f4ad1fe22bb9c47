"""What a merge will do, tensor by tensor, decided from headers alone. Every consistency check is here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .checkpoint import Checkpoint, TensorSource
from .dtypes import DType, is_integer
from .errors import PlanError
from .methods import Method
from .operations import Row
from .output_shards import OutputTensor
from .plan_checks import (
    check_distinct,
    check_mergeable,
    check_no_extra,
    exclude_hint,
    matching,
    unique_labels,
    unused_exclude,
)
from .recipe import Recipe

# The first component of a name that is a number ends the layer's name: model.layers.12.self_attn.q_proj.weight.
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: the tensor's name, the same in all checkpoints and the output.
        shape: its shape.
        layer: the decoder layer it belongs to, or its own name.
        base: where the base's bytes are, if the merge adds task vectors to it; the source of a copied tensor.
        models: where each model's bytes are, in the order of the models; empty for a copied tensor.
        out_dtype: dtype in the output.
        action: ``merge``, or ``copy`` the base's bytes (excluded by name, or an integer buffer).
        method: how it is merged, with the parameters of this tensor; None for a copied one.
        columns: which models of the plan ``models`` are; empty for a copied tensor.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    base: TensorSource | None
    models: tuple[TensorSource, ...]
    out_dtype: DType
    action: Literal["merge", "copy"]
    method: Method | None = None
    columns: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """Return what is read of it: the base, where there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def nbytes_read(self) -> int:
        """Return the bytes of all sources."""
        return sum(source.nbytes for source in self.sources)

    @property
    def row(self) -> Row:
        """Return a merged tensor as the operations take it."""
        assert self.method is not None  # the plan gives every merged tensor one
        return Row(self.name, self.shape, self.method, len(self.models), self.base is not None)

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def output(self) -> OutputTensor:
        """Return the tensor as the writer takes it."""
        return OutputTensor(self.name, self.out_dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Buffer:
    """An integer tensor that is copied, and the same tensor of other models, by their labels."""

    source: TensorSource
    others: tuple[tuple[str, TensorSource], ...]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The tensors of one scope: what one set of coefficients is solved for."""

    name: str
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class ToolPart:
    """What a tool that has made a plan adds to the merge (docs/integrating.md).

    Attributes:
        files: name and content, as ``CheckpointWriter.add_file`` takes them, of what goes into the output beside the
            weights, in place of the base's files and the model card.
        record: what ``metagpt_fast.json`` keeps under ``tool``; plain values.
        computed: a checkpoint of tensors that the tool has computed, if there are some; the plan copies them.
    """

    files: tuple[tuple[str, bytes | Path], ...]
    record: Mapping[str, Any]
    computed: Checkpoint | None = None


@dataclass(frozen=True)
class MergePlan:
    """A whole merge.

    Attributes:
        recipe: what was asked for.
        base: the checkpoint that gives config, tokenizer and what is copied: the base.
        models: the checkpoints that are combined; the base is among them where the method takes it as a model.
        labels: a short, unique name of each model.
        tensors: every tensor of the output, layer by layer, in the order of the base's files.
        buffers: integer tensors, which have to be the same in all checkpoints.
        config_layers: for each layer of the output, which layer of the base its configuration is that of; None where
            the output has the base's layers.
        warnings: sentences for the user about what was asked for.
        tool: what is another tool's, if one has made the plan.
    """

    recipe: Recipe
    base: Checkpoint
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    buffers: tuple[Buffer, ...]
    config_layers: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()
    tool: ToolPart | None = None

    @cached_property
    def merged(self) -> tuple[TensorPlan, ...]:
        """Return the tensors that are merged."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "merge")

    @cached_property
    def copied(self) -> tuple[TensorPlan, ...]:
        """Return the tensors that are copied from the base."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "copy")

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Return every checkpoint once, the base first."""
        computed = None if self.tool is None else self.tool.computed
        every = (self.base, *self.models, *(() if computed is None else (computed,)))
        return tuple({id(each): each for each in every}.values())

    @cached_property
    def scopes(self) -> tuple[LayerPlan, ...]:
        """Return the merged tensors by the recipe's granularity: what one solve is for."""
        if self.recipe.granularity == "model":
            return (LayerPlan("model", self.merged),) if self.merged else ()
        groups: dict[str, list[TensorPlan]] = {}
        for tensor in self.merged:
            key = tensor.layer if self.recipe.granularity == "layer" else tensor.name
            groups.setdefault(key, []).append(tensor)
        return tuple(LayerPlan(name, tuple(tensors)) for name, tensors in groups.items())

    @property
    def reads_twice(self) -> bool:
        """Return whether every model is measured whole before it is combined."""
        return self.recipe.method.needs_measurement and self.recipe.granularity == "model"

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all output tensors."""
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def nbytes_measured(self) -> int:
        """Return the bytes that measuring reads: what every merged tensor is made of."""
        return sum(t.nbytes_read for t in self.merged)

    @cached_property
    def nbytes_combined(self) -> int:
        """Return the bytes that combining reads: what the method combines, and the copied tensors."""
        return sum(t.nbytes_read for t in self.tensors)

    @cached_property
    def nbytes_written(self) -> int:
        """Return the bytes of the output's tensors."""
        return sum(tensor.output.nbytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for ``--dry-run --json``."""
        return {
            "base": str(self.base.path),
            "models": [str(model.path) for model in self.models],
            "labels": list(self.labels),
            "method": self.recipe.method.name,
            "parameters": self.recipe.method.parameters(),
            "granularity": self.recipe.granularity,
            "num_scopes": len(self.scopes),
            "num_tensors": len(self.tensors),
            "num_copied": len(self.copied),
            "num_parameters": self.num_parameters,
            "nbytes_measured": self.nbytes_measured if self.recipe.method.needs_measurement else 0,
            "nbytes_combined": self.nbytes_combined,
            "nbytes_written": self.nbytes_written,
            "tensors": [
                {
                    "name": t.name,
                    "layer": t.layer,
                    "shape": list(t.shape),
                    "action": t.action,
                    "base_dtype": t.base.dtype.name if t.base is not None else None,
                    "model_dtypes": [source.dtype.name for source in t.models],
                    "out_dtype": t.out_dtype.name,
                    "sources": [{"path": str(source.path), "name": source.name} for source in t.sources],
                    "models": [self.labels[column] for column in t.columns],
                    "parameters": {} if t.method is None else t.method.parameters(),
                }
                for t in self.tensors
            ],
        }


def make_plan(recipe: Recipe, base: Checkpoint, models: Sequence[Checkpoint]) -> MergePlan:
    """Return the plan for merging these checkpoints.

    Raises:
        PlanError: the base is one of the models; a tensor is missing, extra, or of another shape in a model; a dtype
            cannot be merged; or nothing is left to merge.
    """
    labels = unique_labels(models)
    check_distinct(base, models)
    tensors: list[TensorPlan] = []
    buffers: list[Buffer] = []
    for name, source in base.tensors.items():
        if recipe.exclude is not None and recipe.exclude.search(name):
            tensors.append(_copy(source))
            continue
        sources = tuple(matching(source, model, labels[i], base) for i, model in enumerate(models))
        if is_integer(source.dtype):
            buffers.append(Buffer(source, tuple(zip(labels, sources, strict=True))))
            tensors.append(_copy(source))
        else:
            for each in (source, *sources):
                if not each.dtype.is_mergeable:  # else the hint, of every tensor, would be made for nothing
                    check_mergeable(each, exclude_hint(each.name))
            tensors.append(_merge(recipe, source, sources))
    check_no_extra(recipe.exclude, base, models, labels)
    if not any(tensor.action == "merge" for tensor in tensors):
        raise PlanError(
            "there is nothing to merge",
            where=base.path,
            got=f"{len(tensors)} tensors, all excluded or integer",
            expected="at least one floating-point tensor",
        )
    if recipe.method.base == "model":
        models = (base, *models)
        labels = unique_labels(models)
    warnings = unused_exclude(recipe.exclude, base, models)
    return MergePlan(recipe, base, tuple(models), labels, sort_by_layer(tensors), tuple(buffers), warnings=warnings)


def layer_of(name: str) -> str:
    """Return the layer of a tensor: the name up to its first number, or the whole name if it has none."""
    match = _LAYER.match(name)
    return match.group() if match else name


def _merge(recipe: Recipe, base: TensorSource, models: tuple[TensorSource, ...]) -> TensorPlan:
    """Return the plan of a tensor that all checkpoints have; the method says how the base takes part."""
    use = recipe.method.base
    if use == "model":
        models = (base, *models)
    return TensorPlan(
        name=base.name,
        shape=base.shape,
        layer=layer_of(base.name),
        base=base if use in {"required", "optional"} else None,
        models=models,
        out_dtype=recipe.out_dtype or base.dtype,
        action="merge",
        method=recipe.method,
        columns=tuple(range(len(models))),
    )


def _copy(source: TensorSource) -> TensorPlan:
    return TensorPlan(source.name, source.shape, layer_of(source.name), source, (), source.dtype, "copy")


def sort_by_layer(tensors: Sequence[TensorPlan]) -> tuple[TensorPlan, ...]:
    """Return the tensors layer by layer, the layers in order of their first tensors."""
    order = {layer: i for i, layer in enumerate(dict.fromkeys(tensor.layer for tensor in tensors))}
    return tuple(sorted(tensors, key=lambda tensor: order[tensor.layer]))


def input_paths(plan: MergePlan) -> tuple[Path, ...]:
    """Return the folders and files that the merge reads, as given."""
    return tuple(checkpoint.path for checkpoint in plan.checkpoints)
