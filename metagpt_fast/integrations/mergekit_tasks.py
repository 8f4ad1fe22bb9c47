"""Tensors that mergekit computes with its own tasks: one by one, into a checkpoint that the plan copies from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import IntegrationError
from ..safetensors_file import ShardFile, TensorSource, read_header
from ..untrusted import brief
from .mergekit_config import mergekit_errors

# Tensors are gathered up to this size and written to one file.
_SHARD_NBYTES = 128 << 20


def run_tasks(tasks: Iterable[Any], options: Any, *, known: dict[Any, Any] | None = None) -> Iterator[tuple[Any, Any]]:
    """Carry out mergekit's tasks with mergekit's executor, one after the other; yield each with its value.

    Args:
        tasks: what to carry out. A task is planned on its own: the executor's planning is quadratic in their number.
        options: mergekit's ``MergeOptions``, for the device.
        known: values of tasks that were carried out before.
    """
    from mergekit.graph import Executor, TaskUniverse

    for task in tasks:
        universe = TaskUniverse([task])
        values = {universe.get_handle(other): value for other, value in (known or {}).items()}
        executor = Executor(
            targets=[universe.get_handle(task)],
            math_device=options.device or "cpu",
            storage_device="cpu",
            cached_values={handle: value for handle, value in values.items() if handle is not None},
        )
        yield from executor.run(quiet=True)


def compute(saves: Iterable[Any], options: Any, folder: Path, known: dict[Any, Any]) -> Checkpoint | None:
    """Compute the tensors of mergekit's ``SaveTensor`` tasks, and return them as a checkpoint; None without any.

    Args:
        saves: the tasks. Optional ones may turn out to make nothing.
        options: mergekit's ``MergeOptions``.
        folder: where to write, an empty folder of the caller's.
        known: values of tasks that were carried out before.

    Raises:
        IntegrationError: mergekit cannot compute one.
    """
    from mergekit.common import dtype_from_name
    from mergekit.io.tasks import LoaderCache

    shards: list[ShardFile] = []
    tensors: dict[str, TensorSource] = {}
    gathered: dict[str, Any] = {}
    nbytes = 0
    for save in saves:
        with mergekit_errors(f"tensor {brief(save.tensor_name)}"):
            ((_, value),) = run_tasks([save.tensor_task], options, known=known)
        if value is None:
            if not save.optional:
                where = f"tensor {brief(save.tensor_name)}"
                raise IntegrationError("mergekit made nothing of a tensor that is required", where=where)
            continue
        if save.dtype:
            value = value.to(dtype=dtype_from_name(save.dtype))
        # A copy: two outputs may be one tensor in memory, which the file format does not have.
        gathered[save.tensor_name] = value.detach().cpu().contiguous().clone()
        nbytes += value.nbytes
        del value
        if nbytes >= _SHARD_NBYTES:
            _write(gathered, folder, shards, tensors)
            nbytes = 0
    _write(gathered, folder, shards, tensors)
    LoaderCache().flush_all()
    if not tensors:
        return None
    return Checkpoint(folder, "computed by mergekit", tuple(shards), tensors, is_bare_file=False, metadata={})


def _write(gathered: dict[str, Any], folder: Path, shards: list[ShardFile], tensors: dict[str, TensorSource]) -> None:
    """Write what is gathered to a file of its own, and forget it."""
    from safetensors.torch import save_file

    if not gathered:
        return
    path = folder / f"computed-{len(shards):05d}.safetensors"
    save_file(gathered, path)
    gathered.clear()
    header = read_header(path)
    shards.append(header.file)
    tensors.update({source.name: source for source in header.tensors})
