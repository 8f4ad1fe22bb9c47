"""What a merge is made from: what its measurement is keyed to, and what a run that resumes it must have in common."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._version import __version__
from .errors import DataError
from .measurement import Measurement, check_writable
from .plan import MergePlan
from .recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .output_shards import OutputShard

    FloatArray = NDArray[np.float64]

Fingerprints = Sequence[list[dict[str, Any]]]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def fingerprints_of(plan: MergePlan) -> tuple[list[dict[str, Any]], ...]:
    """Return what identifies the files of every checkpoint of the plan.

    Raises:
        CheckpointError: a file has changed since it was opened, or cannot be read any more.
    """
    return tuple(checkpoint.fingerprint() for checkpoint in plan.checkpoints)


def check_unchanged(plan: MergePlan, fingerprints: Fingerprints) -> None:
    """Raise if a file was replaced while it was read; ``fingerprint`` itself raises if size or time changed."""
    for checkpoint, before in zip(plan.checkpoints, fingerprints, strict=True):
        if checkpoint.fingerprint() != before:
            raise DataError("the files changed while they were read", where=checkpoint.path)


def load_gram(plan: MergePlan, measurement: str | Path | None, fingerprints: Fingerprints) -> FloatArray | None:
    """Return the plan's Gram matrices from the file ``measurement``; None if it is to be made, or not needed.

    Raises:
        MeasurementError: the file is stale or broken, or cannot be written.
    """
    if measurement is None or not plan.recipe.method.uses_measurement:
        return None
    if not os.path.lexists(measurement):
        check_writable(measurement, measurement_nbytes(plan, fingerprints))
        return None
    names = [tensor.name for tensor in plan.merged]
    return Measurement.load(measurement).select(
        fingerprints[0], fingerprints[1:], names, where=measurement, labels=plan.labels
    )


def has_measurement(plan: MergePlan, measurement: str | Path | None) -> bool:
    """Return whether the file ``measurement`` is there, and has what this plan would measure.

    Raises:
        MeasurementError: the file is stale or broken.
    """
    if measurement is None or not os.path.lexists(measurement):
        return False
    return load_gram(plan, measurement, fingerprints_of(plan)) is not None


def measurement_nbytes(plan: MergePlan, fingerprints: Fingerprints) -> int:
    """Return at least the bytes that a saved measurement of this plan takes."""
    num_products = (len(plan.models) + 1) * (len(plan.models) + 2) // 2
    tensors = sum(200 + 6 * len(tensor.name) + 40 * num_products for tensor in plan.merged)
    return tensors + 4096 * len(plan.checkpoints) + 100 * num_products + 2 * len(json.dumps(fingerprints, indent=4))


def measurement_of(plan: MergePlan, gram: FloatArray, fingerprints: Fingerprints) -> Measurement:
    """Return what was measured, as it is saved."""
    return Measurement(
        base=str(plan.base.path),
        models=tuple(str(model.path) for model in plan.models),
        labels=plan.labels,
        names=tuple(tensor.name for tensor in plan.merged),
        numels=np.array([tensor.numel for tensor in plan.merged], np.int64),
        layers=tuple(tensor.layer for tensor in plan.merged),
        gram=gram,
        fingerprints=tuple(fingerprints),
    )


def job_of(
    plan: MergePlan,
    shards: Sequence[OutputShard],
    fingerprints: Fingerprints,
    gram: FloatArray | None,
    backend: str,
    *,
    is_durable: bool,
) -> dict[str, Any]:
    """Return all that the output's bytes depend on, by names that a user understands, for ``CheckpointWriter``.

    If the output is not durable while it is made, that includes the start of the system: what was written before
    another one may be lost, whatever the journal says.

    Not in it is what they do not depend on: the way to read, the memory window, the number of threads, the instruction
    set, and where the inputs lie.
    """
    labels = dict(zip((id(model) for model in plan.models), plan.labels, strict=True))
    inputs: dict[str, Any] = {}
    computed = None if plan.tool is None else plan.tool.computed
    for checkpoint, files in zip(plan.checkpoints, fingerprints, strict=True):
        if checkpoint is computed:  # every run makes it anew: what counts is all of its content, not its time
            inputs["computed"] = {f"file {shard.path.name}": _file_digest(shard.path) for shard in computed.shards}
            continue
        name = labels.get(id(checkpoint), "base")
        inputs[name] = {f"file {file['name']}": _file_facts(file) for file in files}
    job = {
        **_recipe_parts(plan.recipe),
        "input": inputs,
        "measurement file": None if gram is None else _digest(np.ascontiguousarray(gram).tobytes()),
        "output file": {shard.file_name: f"{shard.nbytes} bytes" for shard in shards},
        "tensors": _digest(_tensors_json(plan)),
        "headers": _digest(*(shard.header for shard in shards)),
        "backend": backend,
        "metagpt_fast version": __version__,
        "NumPy version": np.__version__,
        "start of the system (--no-sync)": None if is_durable else _boot_id(),
    }
    result: dict[str, Any] = json.loads(json.dumps(job))  # as the journal gives it back
    return result


def _file_facts(file: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies a file, by names for people."""
    return {
        "size": f"{file['nbytes']} bytes",
        "last change": _moment(file["mtime_ns"]),
        "header": file["header_sha256"],
        "content": file["sample_sha256"],
    }


def _moment(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):  # some file systems keep years that calendars do not have
        return f"{seconds}.{rest:09} s after 1970"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{rest:09} UTC"


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # then no run can be resumed
        return f"unknown, process {os.getpid()} at {time.time_ns()}"


def _recipe_parts(recipe: Recipe) -> dict[str, Any]:
    return {
        "method": recipe.method.name,
        "parameter": recipe.method.parameters(),
        "granularity": recipe.granularity,
        "dtype": "keep" if recipe.out_dtype is None else recipe.out_dtype.name,
        "exclude": None if recipe.exclude is None else recipe.exclude.pattern,
        "recipe": None if recipe.text is None else _digest(recipe.text.encode()),
    }


def _tensors_json(plan: MergePlan) -> bytes:
    tensors = []
    known: dict[int, dict[str, Any]] = {id(None): {}}  # most plans have few methods, and many tensors
    for each in plan.tensors:
        sources = [source.name for source in each.sources]
        if each.method is not None and id(each.method) not in known:
            known[id(each.method)] = each.method.parameters()
        parameters = known[id(each.method)]
        tensors.append([each.name, each.layer, each.action, each.out_dtype.name, each.columns, sources, parameters])
    return json.dumps([list(plan.labels), tensors]).encode()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
