"""The plan of a merge that is done, made again from its record and its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, MetagptFastError
from .methods import Method, SparseMethod, find_method
from .plan import MergePlan, TensorPlan, make_plan
from .recipe import make_recipe
from .recipe_plan import plan_recipe_text
from .record import Record
from .verify_report import InputCheck

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]


class RecordedMethod(Method):
    """A linear method whose coefficients are those that the merge has recorded."""

    name = "recorded"
    equation = "c as recorded"

    def __init__(self, original: Method, coefficients: FloatArray) -> None:
        object.__setattr__(self, "original", original)
        object.__setattr__(self, "coefficients", coefficients)
        object.__setattr__(self, "solved", None)

    original: Method
    coefficients: FloatArray  # float64 [T]
    solved: FloatArray | None  # float64 [T], what the original method says

    def solve(self, gram: FloatArray, has_base: bool) -> FloatArray:
        """Return the recorded coefficients, and remember what the method would have said."""
        object.__setattr__(self, "solved", self.original.solve(gram, has_base))
        return self.coefficients


def recorded_plan(record: Record, out: Path) -> tuple[MergePlan, Path]:
    """Return the plan of the merge, and the folder that the record's paths are relative to.

    Raises:
        MetagptFastError: the inputs are not there, or do not fit the record.
    """
    folders = list(_folders(record, out))
    for folder in folders[:-1]:
        try:
            return _plan(record, folder), folder
        except MetagptFastError:
            continue
    return _plan(record, folders[-1]), folders[-1]


def recorded_inputs(record: Record, out: Path) -> tuple[list[Checkpoint], Path]:
    """Return the checkpoints that the record has fingerprints of, and the folder that its paths are relative to.

    Raises:
        MetagptFastError: one is not there, or is broken.
    """
    folders = list(_folders(record, out))
    for folder in folders[:-1]:
        try:
            return [open_checkpoint(folder / path) for path in record.fingerprints], folder
        except MetagptFastError:
            continue
    return [open_checkpoint(folders[-1] / path) for path in record.fingerprints], folders[-1]


def check_inputs(record: Record, checkpoints: Sequence[Checkpoint], folder: Path) -> list[InputCheck]:
    """Compare the inputs' fingerprints with the recorded ones."""
    recorded = {folder / path: (path, files) for path, files in record.fingerprints.items()}
    checks = []
    for checkpoint in checkpoints:
        path, files = recorded.get(checkpoint.path, (str(checkpoint.path), None))
        checks.append(_check_input(checkpoint, path, files))
    return checks


def with_recorded_coefficients(plan: MergePlan, record: Record) -> MergePlan:
    """Return the plan with the recorded coefficients wherever the method would have to measure the whole scope.

    Raises:
        CheckpointError: the record has none for one of these tensors.
    """
    rows = {scope: row for row, scope in enumerate(record.scopes)}
    tensors = []
    for tensor in plan.tensors:
        if tensor.method is None or not _is_replaceable(tensor.method):
            tensors.append(tensor)
            continue
        tensors.append(replace(tensor, method=RecordedMethod(tensor.method, _coefficients(record, rows, tensor))))
    return replace(plan, tensors=tuple(tensors))


def needs_whole_scopes(plan: MergePlan) -> bool:
    """Return whether a tensor can only be recomputed with all tensors of its scope."""
    if plan.recipe.granularity == "tensor":
        return False
    return any(isinstance(t.method, SparseMethod) and t.method.needs_moments for t in plan.merged)


def recorded_row(record: Record, tensor: TensorPlan) -> FloatArray:
    """Return the recorded coefficients of a tensor's models, float64 ``[T]``; NaN where none are recorded."""
    rows = {scope: row for row, scope in enumerate(record.scopes)}
    return _coefficients(record, rows, tensor)


def _is_replaceable(method: Method) -> bool:
    return method.needs_measurement and method.axis is None and not isinstance(method, SparseMethod)


def _coefficients(record: Record, rows: dict[str, int], tensor: TensorPlan) -> FloatArray:
    row = rows.get(tensor.name, rows.get(tensor.layer, 0 if len(rows) == 1 else None))
    values = record.coefficients[row] if row is not None else ()
    chosen = [values[column] if column < len(values) else None for column in tensor.columns]
    if any(value is None for value in chosen):
        raise CheckpointError(f"no coefficients of tensor {tensor.name!r}", where=record.path)
    return np.array(chosen, np.float64)


def _folders(record: Record, out: Path) -> Iterator[Path]:
    """Yield the folders that the record's paths may be relative to: where the merge was run, and the current one."""
    given, real = Path(record.out), out.resolve()
    depth = len(given.parts)
    if not given.is_absolute() and ".." not in given.parts and real.parts[-depth:] == given.parts and depth:
        yield Path(*real.parts[:-depth])
    yield Path()


def _plan(record: Record, folder: Path) -> MergePlan:
    if record.recipe is not None:
        return plan_recipe_text(record.recipe, record.path, folder)
    models = list(record.models)
    if find_method(record.method).base == "model":
        models = models[1:]  # the base is one of them
    recipe = make_recipe(
        folder / record.base,
        [folder / model for model in models],
        method=record.method,
        granularity=record.granularity,
        parameters=record.parameters,
        dtype=record.out_dtype,
        exclude=record.exclude,
    )
    return make_plan(recipe, open_checkpoint(recipe.base), [open_checkpoint(path) for path in recipe.models])


def _check_input(checkpoint: Checkpoint, path: str, recorded: list[dict[str, object]] | None) -> InputCheck:
    if recorded is None:
        return InputCheck(path, "changed", "the record has no fingerprint of it")
    found = checkpoint.fingerprint()
    if found == recorded:
        return InputCheck(path, "same")
    before = {str(each.get("name")): each for each in recorded}
    now = {str(each["name"]): each for each in found}
    if before.keys() != now.keys():
        name = min(before.keys() ^ now.keys())
        return InputCheck(path, "changed", f"{name} is {'gone' if name in before else 'new'}")
    for name, facts in now.items():
        for key, what in {"nbytes": "size", "header_sha256": "header", "sample_sha256": "content"}.items():
            if facts[key] != before[name].get(key):
                return InputCheck(path, "changed", f"{name} has another {what}")
    return InputCheck(path, "touched", "only the time of the last change differs")
