"""merge_state_dicts(): the same measure → solve → combine for tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import ops, trust
from .dtypes import parse_output_dtype
from .errors import DataError, PlanError, RecipeError
from .measurement import norms_of
from .plan import layer_of
from .recipe import GRANULARITIES, make_recipe
from .untrusted import brief


def merge_state_dicts(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    method: str = "metagpt",
    granularity: str = "model",
    exponent: float | None = None,
    coefficients: float | Sequence[float] | None = None,
    parameters: Mapping[str, object] | None = None,
    dtype: str = "keep",
    exclude: str | None = None,
    out: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """Merge models that are in memory: θ = θ₀ + Σ_t λ_t (θ_t − θ₀) (arXiv 2406.11385, Eq. 2 and 15).

    Args:
        base: tensors of the base by name: NumPy arrays, torch CPU tensors, or others through DLPack, contiguous, of
            float32, float16, bfloat16 or float64. Integer tensors are passed on as they are.
        models: T mappings with the base's names and shapes.
        method: as for :func:`metagpt_fast.merge`.
        granularity: as for :func:`metagpt_fast.merge`.
        exponent: as for :func:`metagpt_fast.merge`.
        coefficients: as for :func:`metagpt_fast.merge`.
        parameters: as for :func:`metagpt_fast.merge`.
        dtype: of new tensors, as for :func:`metagpt_fast.merge`; not with ``out``.
        exclude: as for :func:`metagpt_fast.merge`.
        out: tensors to write into, by name: may be ``base`` itself, which updates it in place.
        threads: threads for the kernels.
        backend: ``auto``, ``cpu`` or ``reference``.

    Returns:
        The merged tensors by name: new ones of the base's library, or those of ``out``.

    Raises:
        RecipeError: an argument, or a tensor, cannot be used.
        PlanError: a tensor is missing from a model, or extra in it.
        DataError: the tensors hold NaN or Inf, or no model differs from the base.
    """
    if granularity not in GRANULARITIES:
        raise RecipeError(
            "unknown granularity",
            where="granularity",
            got=repr(granularity),
            expected=", ".join(GRANULARITIES),
        )
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
    merged_names, kept_names = _split(base, models, recipe.exclude)
    result: dict[str, Any] = {name: base[name] for name in kept_names}
    bases = [base[name] for name in merged_names]
    columns = [[model[name] for name in merged_names] for model in models]

    scopes = _scopes(merged_names, granularity)
    weights = np.empty((len(merged_names), len(models)))
    gram = np.zeros((len(merged_names), 1 + len(models), 1 + len(models)))
    if recipe.method.needs_measurement:
        gram = ops.layer_gram(bases, columns, threads=threads, backend=backend)
        _check_finite(gram, merged_names)
        labels = [f"models[{t}]" for t in range(len(models))]
        trust.check_any_change(labels, norms_of(gram.sum(axis=0)), "base")
    for rows in scopes:
        weights[rows] = recipe.method.solve(gram[rows].sum(axis=0))

    outputs = None if out is None else [_output(out, name) for name in merged_names]
    if outputs is None:
        wanted = parse_output_dtype(dtype)
        outputs = [
            ops.empty_like(array, wanted or ops.view(array, brief(name)).dtype, brief(name))
            for name, array in zip(merged_names, bases, strict=True)
        ]
    elif dtype != "keep":
        raise RecipeError("dtype and out exclude each other", where="dtype", got=repr(dtype))
    ops.layer_merge(
        bases if recipe.method.uses_base else None,
        columns,
        weights,
        outputs,
        threads=threads,
        backend=backend,
    )
    result.update(zip(merged_names, outputs, strict=True))
    return {name: result[name] for name in base}


def _split(base: Mapping[str, Any], models: Sequence[Mapping[str, Any]], exclude: Any) -> tuple[list[str], list[str]]:
    """Return the names to merge and those kept from the base, after comparing the mappings."""
    merged: list[str] = []
    kept: list[str] = []
    for name, array in base.items():
        is_excluded = exclude is not None and exclude.search(name)
        if is_excluded or _is_integer(array):
            kept.append(name)
        else:
            merged.append(name)
        for t, model in enumerate(models):
            if not is_excluded and name not in model:
                raise PlanError(f"tensor {brief(name)} is missing", where=f"models[{t}]", hint="or use exclude=")
    for t, model in enumerate(models):
        for name in model:
            if name not in base and not (exclude is not None and exclude.search(name)):
                raise PlanError(f"tensor {brief(name)} is not in the base", where=f"models[{t}]")
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


def _check_finite(gram: Any, names: Sequence[str]) -> None:
    is_finite = np.isfinite(np.diagonal(gram, axis1=1, axis2=2))
    if not is_finite.all():
        row, operand = (int(i) for i in np.argwhere(~is_finite)[0])
        owner = "the base" if operand == 0 else f"models[{operand - 1}] or the base"
        raise DataError(f"tensor {brief(names[row])} of {owner} holds NaN or Inf", where="merge_state_dicts")


def _output(out: Mapping[str, Any], name: str) -> Any:
    if name not in out:
        raise PlanError(f"tensor {brief(name)} is missing", where="out")
    return out[name]
