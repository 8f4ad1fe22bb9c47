"""Whether checkpoints fit each other: names, shapes, dtypes; and what to do about it if they do not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .checkpoint import Checkpoint, TensorSource
from .dtypes import is_integer
from .errors import PlanError
from .untrusted import brief

_VOCABULARY = re.compile(r"embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings")


def unique_labels(models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return a label for each model, numbered where the models' own are the same."""
    names = [model.label for model in models]
    taken = set(names)
    labels = []
    for name in names:
        label, number = name, 0
        while names.count(name) > 1 and label in taken:
            number += 1
            label = f"{name} ({number})"
        taken.add(label)
        labels.append(label)
    return tuple(labels)


def check_distinct(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise PlanError if the base is also one of the models."""
    for model in models:
        if _same_files(base, model):
            raise PlanError(
                "the base is also given as one of the models",
                where=model.path,
                got=f"the files of {base.path}, which is the base",
                expected="models fine-tuned from it",
                hint="name the base first and once: metagpt-fast merge BASE MODEL [MODEL ...]",
            )


def _same_files(a: Checkpoint, b: Checkpoint) -> bool:
    return _identities(a) == _identities(b)


def _identities(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    stats = [shard.path.stat() for shard in checkpoint.shards]
    return sorted((stat.st_dev, stat.st_ino) for stat in stats)


def matching(base: TensorSource, model: Checkpoint, label: str, base_checkpoint: Checkpoint) -> TensorSource:
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
        raise shape_mismatch(base, found, label, base_checkpoint)
    if is_integer(base.dtype) != is_integer(found.dtype):
        raise PlanError(
            f"dtype of tensor {brief(base.name)} in {label}",
            where=found.path,
            got=found.dtype.name,
            expected=f"{base.dtype.name}, as in the base",
            hint=exclude_hint(base.name),
        )
    return found


def shape_mismatch(
    base: TensorSource, found: TensorSource, label: str, base_checkpoint: Checkpoint | None
) -> PlanError:
    """Return the error for a model's tensor that has not the base's shape; None: there is no --exclude to advise."""
    is_vocabulary = bool(_VOCABULARY.search(base.name)) and found.shape[1:] == base.shape[1:]
    what = f"shape of tensor {brief(found.name)} in {label}"
    if is_vocabulary:
        what += " (the vocabularies differ: this model's tokenizer has other tokens than the base's)"
    hint = None
    if base_checkpoint is not None:
        hint = _pattern_hint(_vocabulary_pattern(base_checkpoint)) if is_vocabulary else exclude_hint(base.name)
    owner = "the base" if base_checkpoint is not None else str(base.path)
    return PlanError(
        what, where=found.path, got=_shape(found.shape), expected=f"{_shape(base.shape)}, as in {owner}", hint=hint
    )


def check_mergeable(source: TensorSource, hint: str | None = None) -> None:
    """Raise PlanError unless the kernels take the tensor's dtype."""
    if source.dtype.is_mergeable:
        return
    convert = "quantized and scaled formats have to be converted to bf16 first"
    raise PlanError(
        f"tensor {brief(source.name)} has a dtype that cannot be merged",
        where=source.path,
        got=source.dtype.name,
        expected="F32, F16, BF16 or F64",
        hint=convert if hint is None else f"{convert}; {hint}",
    )


def check_no_extra(
    exclude: re.Pattern[str] | None, base: Checkpoint, models: Sequence[Checkpoint], labels: Sequence[str]
) -> None:
    """Raise PlanError if a model has tensors that the base has not."""
    for model, label in zip(models, labels, strict=True):
        extra = [
            name
            for name in model.tensors
            if name not in base.tensors and not (exclude is not None and exclude.search(name))
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


def unused_exclude(exclude: re.Pattern[str] | None, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return a sentence for the user if the pattern finds no tensor at all."""
    if exclude is None or any(exclude.search(name) for each in (base, *models) for name in each.tensors):
        return ()
    return (f"--exclude {_quote(exclude.pattern)} matches no tensor: all of them are merged",)


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
