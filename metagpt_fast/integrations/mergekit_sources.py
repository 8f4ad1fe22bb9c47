"""Where the bytes are that a planned mergekit task reads: files, names, rows; and why some have no such place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, TensorSource, open_checkpoint
from ..errors import CheckpointError, PlanError
from ..untrusted import brief


class NotPlain(Exception):  # noqa: N818 (nothing is wrong)
    """A tensor that the engine cannot take; the message is the reason, the same for all tensors of a kind."""


class Sources:
    """Finds the sources of ``GatherTensors`` and of the tasks that mergekit wraps around it.

    Args:
        tokenizer: the value of the merge's ``BuildTokenizer`` task, if it has one.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._opened: dict[str, Checkpoint | str] = {}
        self._renamed: dict[int, dict[str, str]] = {}
        self._kept_rows: dict[tuple[Any, ...], int] = {}
        self.used: dict[int, set[str]] = {}

    def of(self, task: Any, models: tuple[Any, ...]) -> list[tuple[Checkpoint, TensorSource, str | None]]:
        """Return checkpoint, place and configured dtype of each model's tensor, in the order of ``models``.

        Raises:
            NotPlain: mergekit makes them in a way that is more than reading.
            PlanError: the index that mergekit has read and the files do not fit, or shapes differ.
        """
        from mergekit.io.tasks import GatherTensors
        from mergekit.tokenizer import PermutedVocabulary
        from mergekit.tokenizer.truncate import TruncatedVocabulary

        gather = task if isinstance(task, GatherTensors) else getattr(task, "gather_tensors", None)
        if not isinstance(gather, GatherTensors):
            raise NotPlain(f"inputs come from a {type(task).__name__}")
        found = [self._find(model, gather.weight_info[model], gather.dtype) for model in models]
        rows = None
        if isinstance(task, PermutedVocabulary):
            rows = self._rows_in_place(task, models)
        elif isinstance(task, TruncatedVocabulary):
            if task.weight_info.vocabulary_axis != 0:
                raise NotPlain("truncated along another axis than the first")
            rows = min(source.shape[0] for _, source, _ in found)
        elif task is not gather:
            raise NotPlain(f"inputs come from a {type(task).__name__}")
        if rows is not None:
            found = [(checkpoint, _first_rows(source, rows), dtype) for checkpoint, source, dtype in found]
        _check_shapes(found)
        return found

    def checkpoint(self, model: Any) -> Checkpoint:
        """Return the checkpoint of a model; raises NotPlain if the engine does not read its files."""
        from mergekit.io.tasks import LoaderCache

        index = LoaderCache().get(model).index
        path = os.path.realpath(index.base_path)
        if path not in self._opened:
            self._opened[path] = _open(Path(index.base_path), index)
        opened = self._opened[path]
        if isinstance(opened, str):
            raise NotPlain(opened)
        return opened

    @property
    def opened(self) -> list[Checkpoint]:
        """Return every checkpoint that was opened so far."""
        return [each for each in self._opened.values() if isinstance(each, Checkpoint)]

    def _find(self, model: Any, info: Any, dtype: str | None) -> tuple[Checkpoint, TensorSource, str | None]:
        checkpoint = self.checkpoint(model)
        names = (info.name, *(info.aliases or ()))
        for name in (*names, *(info.tied_names or ())):
            if name in checkpoint.tensors:
                break
        else:
            renamed = self._renames(model, checkpoint)
            name = next((renamed[name] for name in names if name in renamed), "")
        source = checkpoint.tensors.get(name)
        if source is not None:
            self.used.setdefault(id(checkpoint), set()).add(name)
            return checkpoint, source, info.force_dtype or dtype
        if info.optional:
            raise NotPlain("optional, and missing from a model")
        raise NotPlain("not in a model's files under this name: converted from other tensors")

    def _renames(self, model: Any, checkpoint: Checkpoint) -> dict[str, str]:
        """Return the names in the file by those that transformers gives the tensors while loading, if it only renames.

        Multimodal checkpoints have names of older versions. Where transformers also makes tensors of several, as for
        mixtures of experts, mergekit does it for all of the model.
        """
        if id(checkpoint) not in self._renamed:
            self._renamed[id(checkpoint)] = _renames(model, checkpoint)
        return self._renamed[id(checkpoint)]

    def _rows_in_place(self, task: Any, models: tuple[Any, ...]) -> int:
        """Return how many rows a tokenizer merge keeps, if it keeps the first ones in their places.

        So it is where all models have the tokenizer of the output; else rows move, and mergekit moves them.
        """
        reason = NotPlain("rows of the vocabulary move to their places in another tokenizer")
        if task.vocabulary_axis != 0 or any(config.force for _, config in (task.tokens or {}).items()):
            raise reason
        if models not in self._kept_rows:
            self._kept_rows[models] = self._common_prefix(models)
        num_tokens = self._kept_rows[models]
        if num_tokens < 0 or (task.pad_to_multiple_of and num_tokens % task.pad_to_multiple_of):
            raise reason
        return num_tokens

    def _common_prefix(self, models: tuple[Any, ...]) -> int:
        assert self._tokenizer is not None  # a task that needs it depends on it
        vocabulary: Mapping[str, int] = self._tokenizer.tokenizer.get_vocab()
        tokens = range(len(vocabulary))
        if set(vocabulary.values()) != set(tokens):
            return -1
        for model in models:
            permutation = self._tokenizer.permutations[model]
            if any(permutation.get(token) != token for token in tokens):
                return -1
        return len(vocabulary)


def _open(path: Path, index: Any) -> Checkpoint | str:
    """Return the checkpoint, or why mergekit has to read it."""
    if not index.is_safetensors:
        return "read from pickle files"
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return f"read by mergekit only: {error}"
    for name, file_name in index.tensor_paths.items():
        source = checkpoint.tensors.get(name)
        if source is None or source.path.name != file_name:
            raise PlanError(
                f"mergekit would read tensor {brief(name)} from another file than transformers does",
                where=path,
                got=f"it in {file_name}" + ("" if source is None else f", and in {source.path.name}"),
                expected="one set of files",
                hint="the folder holds weights of two models; remove the index, or the file, that is out of date",
            )
    return checkpoint


def _renames(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    from mergekit.io.tasks import LoaderCache
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    kind = model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
    transforms = get_checkpoint_conversion_mapping(kind) or []
    if not all(isinstance(transform, WeightRenaming) for transform in transforms):
        return {}
    found = {name: name for name in checkpoint.tensors}
    for transform in transforms:
        for name, origin in list(found.items()):
            renamed, pattern = transform.rename_source_key(name)
            if pattern is not None:
                found[renamed] = origin
    return found


def _first_rows(source: TensorSource, rows: int) -> TensorSource:
    if source.shape[0] < rows:
        raise NotPlain("rows of the vocabulary move to their places in another tokenizer")
    return source if source.shape[0] == rows else replace(source, shape=(rows, *source.shape[1:]))


def _check_shapes(found: list[tuple[Checkpoint, TensorSource, str | None]]) -> None:
    first = found[0][1]
    for checkpoint, source, _ in found[1:]:
        if source.shape != first.shape:
            raise PlanError(
                f"shape of tensor {brief(source.name)} in {checkpoint.label}",
                where=source.path,
                got=list(source.shape),
                expected=f"{list(first.shape)}, as in {first.path}",
                hint="for vocabularies of different size: tokenizer: {source: base}, or --unsafe-truncate-embeddings",
            )
