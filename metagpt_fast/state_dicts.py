"""merge_state_dicts(): the same measure → solve → combine for tensors in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import ops, trust
from .array_views import ArrayView, common_device, empty_like, view
from .backends import Backend, DeviceBackend, make_backend
from .backends.tables import LayerTable, layer_table, output_table
from .dtypes import parse_output_dtype
from .errors import DataError, PlanError, RecipeError
from .measurement import norms_of
from .operations import Operation, Row, make_operation
from .plan import layer_of
from .recipe import make_recipe
from .untrusted import brief

_EXCLUDE = "to take the base's, use exclude="


def merge_state_dicts(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    method: str = "metagpt",
    granularity: str | None = None,
    exponent: float | None = None,
    coefficients: str | float | Sequence[float] | None = None,
    parameters: Mapping[str, object] | None = None,
    dtype: str = "keep",
    exclude: str | None = None,
    out: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """Merge models that are in memory: θ = θ₀ + Σ_t λ_t (θ_t − θ₀) (arXiv 2406.11385, Eq. 2 and 15).

    Args:
        base: tensors of the base by name: NumPy arrays, torch tensors, or others through DLPack, contiguous, of
            float32, float16, bfloat16 or float64; all on the CPU, or all (torch's) on one GPU. Integer tensors have to
            be the same in all models.
        models: T mappings with the base's names and shapes.
        method: as for :func:`metagpt_fast.merge`.
        granularity: as for :func:`metagpt_fast.merge`.
        exponent: as for :func:`metagpt_fast.merge`.
        coefficients: as for :func:`metagpt_fast.merge`.
        parameters: as for :func:`metagpt_fast.merge`.
        dtype: of new tensors, as for :func:`metagpt_fast.merge`; not with ``out``.
        exclude: as for :func:`metagpt_fast.merge`.
        out: tensors to write into, by name: may be ``base`` itself, which updates it in place. Integer and excluded
            tensors are not merged, and not written: the result has the base's own. Two names may share memory where
            they do in the base and in every model (tied embeddings); it is written once.
        threads: threads for the kernels.
        backend: ``auto``, ``cpu`` or ``reference``; for tensors on a GPU ``auto`` or ``triton``. They are merged where
            they are, on torch's current stream. The host does not wait for a merge by ``metagpt``, at any granularity
            (except to compare integer tensors): NaN and Inf are then not looked for, they spread into the result, and
            models that all equal the base give the base.

    Returns:
        The merged tensors by name: new ones of the base's library, or those of ``out``.

    Raises:
        RecipeError: an argument, or a tensor, cannot be used.
        PlanError: a tensor is missing from a model, extra in it, or of another shape, or integers differ.
        DataError: the tensors hold NaN or Inf, or no model differs from the base.
    """
    if isinstance(models, Mapping):
        raise RecipeError("models", got=type(models).__name__, expected="a list of mappings, one per model")
    recipe = make_recipe(
        "base",
        [f"models[{t}]" for t in range(len(models))],
        method=method,
        granularity=granularity,
        exponent=exponent,
        coefficients=coefficients,
        parameters=parameters,
        dtype=dtype,
        exclude=exclude,
    )
    _check_mappings(base, models)
    names, kept_names = _split(base, models, recipe.exclude)
    bases = [base[name] for name in names]
    layer = _views(names, bases, [[model[name] for name in names] for model in models])
    device = common_device(
        (f"a tensor {brief(name)}", each) for name, row in zip(names, layer, strict=True) for each in row
    )
    outputs = _outputs(names, layer, bases, dtype, out)
    repeated = _repeated(names, layer, outputs, [base[name] for name in kept_names]) if out is not None else set()

    has_base = recipe.method.base in {"required", "optional"}
    operands = [row[recipe.method.base == "ignored" :] for row in layer]
    rows = [
        Row(name, views[0].shape, recipe.method, len(views) - has_base, has_base)
        for name, views in zip(names, operands, strict=True)
    ]
    table = layer_table([[view.place for view in views] for views in operands], [row.numel for row in rows], has_base)
    chosen = make_backend(backend, device)
    exponent_of_share = recipe.method.share_exponent
    if isinstance(chosen, DeviceBackend) and exponent_of_share is not None and has_base:
        _share_on_device(chosen, table, _scopes(names, recipe.granularity), exponent_of_share, outputs, repeated)
        return _by_name(base, kept_names, names, outputs)
    with ops.threads_for_call(threads):
        operation = make_operation(rows, chosen)
        _measure(operation, rows, table, chosen)
        # Outputs that the caller gave may be the operands' own memory.
        is_safe = operation.is_local or out is None
        targets = outputs if is_safe else [empty_like(each, view(each, "out").dtype, "out") for each in outputs]
        out_table = output_table([view(target, "out").place for target in targets])
        for scope in _scopes(names, recipe.granularity):
            operation.solve(scope)
        is_copied = [operation.is_unchanged(k) and out_table.dtypes[k] == table.dtypes[k, 0] for k in range(len(rows))]
        written = sorted(set(range(len(rows))) - repeated)
        merged = [k for k in written if not is_copied[k]]
        if merged:
            operation.combine(table.take(merged), merged, out_table.take(merged))
    if targets is not outputs:
        _copy([targets[k] for k in merged], [outputs[k] for k in merged], threads, backend)
    # As in a merge of files, a tensor that no model changed keeps its bits: 1 · x is x, but −0 + λ · 0 is +0.
    copied_rows = [k for k in written if is_copied[k]]
    _copy([bases[k] for k in copied_rows], [outputs[k] for k in copied_rows], threads, backend)
    return _by_name(base, kept_names, names, outputs)


def _by_name(
    base: Mapping[str, Any], kept_names: Sequence[str], names: Sequence[str], outputs: Sequence[Any]
) -> dict[str, Any]:
    """Return the result in the base's order."""
    result = {name: base[name] for name in kept_names} | dict(zip(names, outputs, strict=True))
    return {name: result[name] for name in base}


def _share_on_device(
    backend: DeviceBackend,
    table: LayerTable,
    scopes: Sequence[Sequence[int]],
    exponent: float,
    outputs: Sequence[Any],
    repeated: set[int],
) -> None:
    """Measure, solve and combine on the device; the host waits for nothing. The rows ``repeated`` are not written."""
    gram = backend.gram_on_device(table)
    coefficients = backend.share_on_device(table, gram, scopes, exponent)
    out_table = output_table([view(output, "out").place for output in outputs])
    # No elements, no work; to pick rows of the tensors would wait for the device.
    numels = np.where(np.isin(np.arange(table.num_tensors), list(repeated)), 0, table.numels)
    backend.merge_on_device(replace(table, numels=numels), coefficients, out_table, unchanged_by=gram)


def _copy(arrays: Sequence[Any], outputs: Sequence[Any], threads: int | None, backend: str) -> None:
    """Copy arrays of the outputs' dtypes: 1 · x + (−0) is x, bit for bit."""
    ops.layer_merge(None, [list(arrays)], [1.0], list(outputs), threads=threads, backend=backend)


def _measure(operation: Operation, rows: Sequence[Row], table: LayerTable, backend: Backend) -> None:
    """Measure if the method needs it, and refuse NaN, Inf, and models that all equal the base."""
    names = [row.name for row in rows]
    if operation.needs_measurement and not operation.measure(table, range(len(rows))).all():
        _refuse_nonfinite(names, table, backend)
        raise DataError("the squared norm of a tensor overflows float64", where="merge_state_dicts")
    if operation.gram is None or not operation.needs_measurement:
        _refuse_nonfinite(names, table, backend)
    elif table.has_base:
        labels = [f"models[{t}]" for t in range(rows[0].num_models)]
        trust.check_any_change(labels, norms_of(trust.sum_of(operation.gram, "merge_state_dicts")), "base")


def _check_mappings(base: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> None:
    for where, each in (("base", base), *((f"models[{t}]", model) for t, model in enumerate(models))):
        if not isinstance(each, Mapping):
            raise RecipeError("not a mapping", where=where, got=type(each).__name__, expected="tensors by name")
        for name in each:
            if not isinstance(name, str):
                raise RecipeError("the name of a tensor", where=where, got=brief(name), expected="a string")


def _split(base: Mapping[str, Any], models: Sequence[Mapping[str, Any]], exclude: Any) -> tuple[list[str], list[str]]:
    """Return the names to merge and those kept from the base, after comparing the mappings."""
    merged: list[str] = []
    kept: list[str] = []
    for name, array in base.items():
        is_excluded = exclude is not None and exclude.search(name)
        is_kept = is_excluded or _is_integer(array)
        (kept if is_kept else merged).append(name)
        for t, model in enumerate(models if not is_excluded else ()):
            if name not in model:
                raise PlanError(f"tensor {brief(name)} is missing", where=f"models[{t}]", hint=_EXCLUDE)
            if is_kept and not _same_integers(array, model[name]):
                raise PlanError(
                    f"integer tensor {brief(name)} differs from the base's",
                    where=f"models[{t}]",
                    expected="the same values: integers cannot be merged",
                    hint=_EXCLUDE,
                )
    for t, model in enumerate(models):
        for name in model:
            if name not in base and not (exclude is not None and exclude.search(name)):
                raise PlanError(f"tensor {brief(name)} is not in the base", where=f"models[{t}]", hint=_EXCLUDE)
    if not merged:
        raise PlanError("there is nothing to merge", where="base", expected="at least one floating-point tensor")
    return merged, kept


def _is_integer(array: Any) -> bool:
    name = str(getattr(array, "dtype", "")).removeprefix("torch.")
    return name.startswith(("int", "uint", "bool"))


def _scopes(names: Sequence[str], granularity: str) -> list[list[int]]:
    """Return the rows of each scope."""
    if granularity == "model":
        return [list(range(len(names)))]
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(layer_of(name) if granularity == "layer" else name, []).append(row)
    return list(groups.values())


def _same_integers(a: Any, b: Any) -> bool:
    if not _is_integer(b):
        return False
    try:
        if getattr(a, "is_cuda", False) is True and getattr(b, "is_cuda", False) is True:
            is_alike = a.dtype == b.dtype and a.shape == b.shape
            return is_alike and (a.data_ptr() == b.data_ptr() or bool((a == b).all()))
        a, b = np.asarray(a), np.asarray(b)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's meta tensors, or those of several devices
        raise RecipeError(f"an integer tensor cannot be read ({error})", where="merge_state_dicts") from error
    return a.dtype == b.dtype and np.array_equal(a, b)


def _views(names: Sequence[str], bases: Sequence[Any], columns: Sequence[Sequence[Any]]) -> list[list[ArrayView]]:
    """Return the views by tensor, base first, after checking that every array can be used and has the base's shape."""
    layer = []
    for k, name in enumerate(names):
        owners = ["base", *(f"models[{t}]" for t in range(len(columns)))]
        arrays = [bases[k], *(column[k] for column in columns)]
        row = [view(array, f"{owner}, tensor {brief(name)}") for owner, array in zip(owners, arrays, strict=True)]
        for owner, each in zip(owners, row, strict=True):
            if each.shape != row[0].shape:
                raise PlanError(
                    f"shape of tensor {brief(name)}",
                    where=owner,
                    got=list(each.shape),
                    expected=f"{list(row[0].shape)}, as in the base",
                    hint=_EXCLUDE,
                )
        layer.append(row)
    return layer


def _refuse_nonfinite(names: Sequence[str], table: LayerTable, backend: Backend) -> None:
    """Raise DataError naming the first tensor with NaN or Inf, if there is one."""
    counts, first = backend.layer_nonfinite(table)
    if counts.any():
        k, operand = (int(i) for i in np.argwhere(counts)[0])
        number = operand - table.has_base
        owner = "the base" if number < 0 else f"models[{number}]"
        raise DataError(
            f"tensor {brief(names[k])} of {owner} holds NaN or Inf",
            where="merge_state_dicts",
            got=f"{counts[k, operand]} such elements, the first at index {first[k, operand]}",
            expected="finite numbers",
        )


def _outputs(
    names: Sequence[str],
    layer: Sequence[Sequence[ArrayView]],
    bases: Sequence[Any],
    dtype: str,
    out: Mapping[str, Any] | None,
) -> list[Any]:
    """Return the arrays to write into: new ones, or those of ``out`` after checking all of them."""
    if out is None:
        wanted = parse_output_dtype(dtype)
        return [
            empty_like(array, wanted or row[0].dtype, brief(name))
            for name, array, row in zip(names, bases, layer, strict=True)
        ]
    if dtype != "keep":
        raise RecipeError("dtype and out exclude each other", where="dtype", got=repr(dtype))
    for name, row in zip(names, layer, strict=True):
        if name not in out:
            raise PlanError(f"tensor {brief(name)} is missing", where="out")
        output = view(out[name], f"out, tensor {brief(name)}", writable=True)
        common_device([(f"the base's {brief(name)}", row[0]), (f"out, tensor {brief(name)}", output)])
        shape = output.shape
        if shape != row[0].shape:
            raise PlanError(
                f"shape of tensor {brief(name)}",
                where="out",
                got=list(shape),
                expected=f"{list(row[0].shape)}, as in the base",
            )
    return [out[name] for name in names]


def _repeated(
    names: Sequence[str], layer: Sequence[Sequence[ArrayView]], outputs: Sequence[Any], kept: Sequence[Any]
) -> set[int]:
    """Return the rows whose output is a second name of another row's, all of whose inputs are, too: tied embeddings.

    Raises:
        RecipeError: writing an output would change a tensor that is read after it, kept, or written as well.
    """
    first_row: dict[tuple[int, int], int] = {}
    repeated = set()
    spans = []  # of memory: first byte, end, the name that it belongs to, whether it is written
    for row, output in enumerate(outputs):
        span = _span(view(output, "out"))
        first = first_row.setdefault(span, row)
        is_tied = [_span(each) for each in layer[row]] == [_span(each) for each in layer[first]]
        if first == row:
            spans.append((*span, names[row], True))
        if first == row or is_tied:
            spans += [(*_span(each), names[row], False) for each in layer[row] if _span(each) != span]
            repeated |= {row} - {first}
        else:
            spans.append((*span, names[row], True))
    for array in kept:
        with contextlib.suppress(RecipeError):  # of a dtype that the kernels, and so the outputs, do not have
            spans.append((*_span(view(array, "base")), "an excluded one", False))
    end = end_of_outputs = 0
    for start, stop, name, is_output in sorted(span for span in spans if span[0] < span[1]):
        if start < (end if is_output else end_of_outputs):
            raise RecipeError(
                f"tensor {brief(name)} shares memory with another that is read or written, too",
                where="out",
                expected="memory of its own, or the base's or a model's tensor of the same name",
                hint="merge without out=, into new tensors",
            )
        end = max(end, stop)
        end_of_outputs = max(end_of_outputs, stop) if is_output else end_of_outputs
    return repeated


def _span(view: ArrayView) -> tuple[int, int]:
    return view.address, view.address + view.numel * view.dtype.itemsize
