"""What a merge will do, tensor by tensor, decided from headers alone. Every consistency check is here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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
from .recipe import Recipe
from .untrusted import brief

# The first component of a name that is a number ends the layer's name: model.layers.12.self_attn.q_proj.weight.
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
_VOCABULARY = re.compile(r"embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings")


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
class LayerPlan:
    """The tensors of one scope: what one set of coefficients is solved for."""

    name: str
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class MergePlan:
    """A whole merge.

    Attributes:
        recipe: what was asked for.
        base: the checkpoint that gives config, tokenizer and what is copied: the base.
        models: the checkpoints that are combined; the base is among them where the method takes it as a model.
        labels: a short, unique name of each model.
        tensors: every tensor of the output, layer by layer, in the order of the base's files.
        buffers: integer tensors, which have to be the same in all checkpoints: the base's with each model's.
        config_layers: for each layer of the output, which layer of the base its configuration is that of; None where
            the output has the base's layers.
    """

    recipe: Recipe
    base: Checkpoint
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    buffers: tuple[tuple[TensorSource, tuple[TensorSource, ...]], ...]
    config_layers: tuple[int, ...] | None = None

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
        return tuple({id(each): each for each in (self.base, *self.models)}.values())

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
    labels = _unique_labels(models)
    _check_distinct(base, models)
    tensors: list[TensorPlan] = []
    buffers: list[tuple[TensorSource, tuple[TensorSource, ...]]] = []
    for name, source in base.tensors.items():
        if recipe.exclude is not None and recipe.exclude.search(name):
            tensors.append(_copy(source))
            continue
        sources = tuple(_matching(source, model, labels[i], base) for i, model in enumerate(models))
        if is_integer(source.dtype):
            buffers.append((source, sources))
            tensors.append(_copy(source))
        else:
            for each in (source, *sources):
                _check_mergeable(each)
            tensors.append(_merge(recipe, source, sources))
    _check_no_extra(recipe, base, models, labels)
    if not any(tensor.action == "merge" for tensor in tensors):
        raise PlanError(
            "there is nothing to merge",
            where=base.path,
            got=f"{len(tensors)} tensors, all excluded or integer",
            expected="at least one floating-point tensor",
        )
    order = {layer: i for i, layer in enumerate(dict.fromkeys(tensor.layer for tensor in tensors))}
    tensors.sort(key=lambda tensor: order[tensor.layer])
    if recipe.method.base == "model":
        models = (base, *models)
        labels = _unique_labels(models)
    return MergePlan(recipe, base, tuple(models), labels, tuple(tensors), tuple(buffers))


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


def _unique_labels(models: Sequence[Checkpoint]) -> tuple[str, ...]:
    names = [model.label for model in models]
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return tuple(labels)


def _check_distinct(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    for model in models:
        if _same_files(base, model):
            raise PlanError(
                "the base is also given as one of the models",
                where=model.path,
                got=f"the same files as the base {base.path}",
                expected="models fine-tuned from it",
                hint="name the base first and once: metagpt-fast merge BASE MODEL [MODEL ...]",
            )


def _same_files(a: Checkpoint, b: Checkpoint) -> bool:
    return _identities(a) == _identities(b)


def _identities(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    stats = [shard.path.stat() for shard in checkpoint.shards]
    return sorted((stat.st_dev, stat.st_ino) for stat in stats)


def _matching(base: TensorSource, model: Checkpoint, label: str, base_checkpoint: Checkpoint) -> TensorSource:
    """Return the model's tensor for the base's, checked against it."""
    found = model.tensors.get(base.name)
    if found is None:
        raise PlanError(
            f"tensor {brief(base.name)} is missing from {label}",
            where=model.path,
            got=f"{len(model.tensors)} tensors",
            expected=f"every one of the {len(base_checkpoint.tensors)} of the base {base_checkpoint.path}",
            hint=f"{exclude_hint(base.name)}, or give the base that this model was fine-tuned from",
        )
    if found.shape != base.shape:
        is_vocabulary = bool(_VOCABULARY.search(base.name)) and found.shape[1:] == base.shape[1:]
        what = f"shape of tensor {brief(base.name)} in {label}"
        if is_vocabulary:
            what += " (the vocabularies differ: this model's tokenizer has other tokens than the base's)"
        raise PlanError(
            what,
            where=found.path,
            got=_shape(found.shape),
            expected=f"{_shape(base.shape)}, as in the base",
            hint=_pattern_hint(_vocabulary_pattern(base_checkpoint)) if is_vocabulary else exclude_hint(base.name),
        )
    if is_integer(base.dtype) != is_integer(found.dtype):
        raise PlanError(
            f"dtype of tensor {brief(base.name)} in {label}",
            where=found.path,
            got=found.dtype.name,
            expected=f"{base.dtype.name}, as in the base",
            hint=exclude_hint(base.name),
        )
    return found


def _check_mergeable(source: TensorSource) -> None:
    if source.dtype.is_mergeable:
        return
    raise PlanError(
        f"tensor {brief(source.name)} has a dtype that cannot be merged",
        where=source.path,
        got=source.dtype.name,
        expected="F32, F16, BF16 or F64",
        hint=f"quantized and scaled formats have to be converted to bf16 first; {exclude_hint(source.name)}",
    )


def _check_no_extra(recipe: Recipe, base: Checkpoint, models: Sequence[Checkpoint], labels: Sequence[str]) -> None:
    for model, label in zip(models, labels, strict=True):
        extra = [
            name
            for name in model.tensors
            if name not in base.tensors and not (recipe.exclude is not None and recipe.exclude.search(name))
        ]
        if extra:
            raise PlanError(
                f"{label} has tensors that the base has not",
                where=model.path,
                got=f"{brief(extra[0])}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else ""),
                expected=f"the tensors of the base {base.path}",
                hint="leave them out of the output with --exclude "
                f"{_quote(_pattern_of(extra[0]))}, or give the base that this model was fine-tuned from",
            )


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def exclude_hint(name: str) -> str:
    """Return the advice to take exactly this tensor from the base, ready for a shell."""
    return _pattern_hint(_pattern_of(name))


def _pattern_of(name: str) -> str:
    """Return a pattern that finds this name and, as long as dots are dots, no other."""
    return "^" + re.escape(name).replace("\\.", ".").replace("\\-", "-") + "$"


def _pattern_hint(pattern: str) -> str:
    return f"take the base's with --exclude {_quote(pattern)}"


def _quote(name: str) -> str:
    return "'" + name.replace("'", "'\\''") + "'"


def _vocabulary_pattern(base: Checkpoint) -> str:
    names = [name for name in base.tensors if _VOCABULARY.search(name)]
    return "|".join(dict.fromkeys(match.group() for name in names if (match := _VOCABULARY.search(name))))


def input_paths(plan: MergePlan) -> tuple[Path, ...]:
    """Return the folders and files that the merge reads, as given."""
    return tuple(checkpoint.path for checkpoint in plan.checkpoints)
