"""From a finished layer pass to the report: coefficients by scope, norms, cosines, warnings."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native, trust
from ._version import __version__
from .artifacts import warnings_for
from .dtypes import F16
from .jobs import measurement_of
from .measurement import Measurement, cosines_of, norms_of
from .methods import SparseMethod
from .report import MergeReport
from .untrusted import brief

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .devices import Choice
    from .input_files import InputFiles
    from .layer_pass import LayerPass
    from .output_shards import OutputShard
    from .plan import MergePlan

    FloatArray = NDArray[np.float64]


def _warnings(plan: MergePlan, layers: LayerPass, copy_code: bool) -> tuple[str, ...]:
    warnings = [*plan.warnings, *plan.recipe.method.warnings()]
    total = layers.total_gram
    if total is not None:
        warnings += trust.task_vector_warnings(
            plan.labels, norms_of(total), cosines_of(total), float(total[0, 0]) ** 0.5
        )
    warnings += trust.share_warnings(plan.labels, coefficients_by_scope(plan, layers.coefficients)[1])
    out_dtypes = {tensor.name: tensor.out_dtype for tensor in plan.merged}
    for name, count in layers.num_nonfinite.items():
        if owners := sorted(layers.nonfinite_owners.get(name, ())):
            problem = f"NaN or Inf, as elements of it are in {', '.join(owners)}"
        elif out_dtypes[name] is F16:
            problem = "too large for the output dtype and became Inf; use --dtype bf16 or f32"
        else:
            problem = f"beyond the range of {out_dtypes[name]} and became Inf or NaN"
        elements, are = ("1 element", "is") if count == 1 else (f"{count} elements", "are")
        warnings.append(f"{elements} of tensor {brief(name)} {are} {problem}")
    return (*warnings, *(warnings_for(plan.base, copy_code=copy_code) if plan.tool is None else ()))


def make_report(
    plan: MergePlan,
    target: Path,
    shards: Sequence[OutputShard],
    layers: LayerPass,
    files: InputFiles,
    chosen: Choice,
    fingerprints: Sequence[list[dict[str, Any]]],
    measurement_reused: bool,
    copy_code: bool,
    started: float,
) -> MergeReport:
    """Return the report of a finished merge."""
    recipe = plan.recipe
    total = layers.total_gram
    computed = None if plan.tool is None else plan.tool.computed
    scopes, coefficients = coefficients_by_scope(plan, layers.coefficients)
    return MergeReport(
        out=target,
        base=str(plan.base.path),
        models=tuple(str(model.path) for model in plan.models),
        labels=plan.labels,
        method=recipe.method.name,
        parameters=recipe.method.parameters(),
        granularity=recipe.granularity,
        exclude=recipe.exclude.pattern if recipe.exclude else None,
        out_dtype=recipe.out_dtype.name.lower() if recipe.out_dtype else "keep",
        scopes=scopes,
        coefficients=coefficients,
        norms=None if total is None else norms_of(total),
        cosines=None if total is None else cosines_of(total),
        base_norm=None if total is None else float(np.sqrt(total[0, 0])),
        warnings=_warnings(plan, layers, copy_code),
        num_tensors=len(plan.tensors),
        num_copied=len(plan.copied) + layers.num_unchanged - (0 if computed is None else len(computed.tensors)),
        num_parameters=plan.num_parameters,
        nbytes_read=layers.nbytes_read,
        nbytes_written=layers.nbytes_written,
        seconds=time.perf_counter() - started,
        seconds_measure=layers.seconds_measure,
        seconds_combine=layers.seconds_combine,
        backend=chosen.backend.name,
        device=chosen.device,
        device_reason=chosen.reason,
        isa=_native.isa(),
        num_threads=_native.num_threads(),
        io=files.io,
        measurement_reused=measurement_reused,
        fingerprints={str(c.path): f for c, f in zip(plan.checkpoints, fingerprints, strict=True) if c is not computed},
        versions={
            "metagpt_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        shards=tuple(shard.file_name for shard in shards),
        recipe=recipe.text,
        num_resumed=layers.num_resumed,
        tool=None if plan.tool is None else dict(plan.tool.record),
        measurement=_reusable(plan, layers, fingerprints),
    )


def _reusable(plan: MergePlan, layers: LayerPass, fingerprints: Sequence[list[dict[str, Any]]]) -> Measurement | None:
    """What another merge of these checkpoints could use: not what was measured for a recipe's own choice of tensors."""
    if layers.gram is None or plan.recipe.text is not None or not plan.recipe.method.uses_measurement:
        return None
    return measurement_of(plan, layers.gram, fingerprints)


def coefficients_by_scope(plan: MergePlan, coefficients: FloatArray) -> tuple[tuple[str, ...], FloatArray]:
    """Return what the rows of a table of coefficients are for, S of them, and the table, float64 ``[S, M]``.

    One row if all tensors have the same coefficients, else one per scope if those within a scope agree, else one per
    tensor. A model that takes no part in a tensor has 0.

    Args:
        plan: M models.
        coefficients: of every merged tensor and its own models, float64 ``[N, T]``.
    """
    table = np.zeros((len(plan.merged), len(plan.models)))
    for row, tensor in enumerate(plan.merged):
        for t, column in enumerate(tensor.columns):
            table[row, column] += coefficients[row, t]
    if not plan.merged:
        return ("model",), np.zeros((1, len(plan.models)))
    has_scopes = plan.recipe.granularity != "model" and not isinstance(plan.recipe.method, SparseMethod)
    if not has_scopes and (table == table[:1]).all():
        return ("model",), table[:1]
    names = [scope.name for scope in plan.scopes for _ in scope.tensors]
    firsts = np.flatnonzero([a != b for a, b in zip(names, [None, *names[:-1]], strict=True)])
    sizes = np.diff([*firsts, len(names)])
    if (table == np.repeat(table[firsts], sizes, axis=0)).all():
        return tuple(names[first] for first in firsts), table[firsts]
    return tuple(tensor.name for tensor in plan.merged), table
