"""The kernels for arrays and tensors in memory: NumPy, ml_dtypes, torch and whatever else speaks DLPack.

A layer is a list of K tensors; ``base[k]`` and ``models[t][k]`` have the same number of elements. Arrays are read in
place, whatever their alignment, and have to be contiguous (C order). Dtypes float32, float16, bfloat16 (``ml_dtypes``,
``torch``) and float64 may be mixed freely.

All arrays of a call are on the CPU, or all of them are torch tensors on one GPU. Then the kernels run on torch's
current stream of that GPU, nothing is copied through the host, and nothing waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from .array_views import CPU, ArrayView, common_device, empty_like, view
from .backends import DeviceBackend, make_backend
from .backends.tables import LayerTable, layer_table, output_table
from .dtypes import parse_output_dtype
from .errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["layer_gram", "layer_merge"]


def layer_gram(
    base: Sequence[Any] | None,
    models: Sequence[Sequence[Any]],
    *,
    threads: int | None = None,
    backend: str = "auto",
) -> Any:
    """Return the Gram matrix of ``[base, τ_1 ... τ_T]`` for every tensor, τ_t = model_t − base.

        gram[k, i, j] = Σ_e v_i[e] v_j[e]

    The squared norms on its diagonal give MetaGPT's λ (arXiv 2406.11385, Eq. 15). Deltas in fp32, sums over blocks of
    4096 elements in fp32 lanes and across blocks in fp64; all in fp64 for a tensor with a float64 operand. Same bits
    for any number of threads and any instruction set. NaN and Inf follow IEEE.

    Args:
        base: K arrays; None takes the models themselves for v.
        models: T lists of K arrays.
        threads: threads for this call; default see :func:`metagpt_fast.set_num_threads`.
        backend: ``auto``, ``cpu`` or ``reference``; for tensors on a GPU ``auto`` or ``triton``.

    Returns:
        float64 ``[K, T+1, T+1]``, or ``[K, T, T]`` without a base: a NumPy array; for tensors on a GPU a tensor there.

    Raises:
        RecipeError: an array cannot be used as it is, or the arrays do not fit each other.
        BackendError: there is no such backend, or it cannot be used for these arrays.
    """
    layer = _layer(base, models)
    num_operands = len(layer[0]) if layer else len(models) + (base is not None)
    gram = np.zeros((len(layer), num_operands, num_operands))
    if not layer:
        return gram
    chosen = make_backend(backend, layer[0][0].device)
    if isinstance(chosen, DeviceBackend):
        return chosen.gram_on_device(_table(layer, base))
    with threads_for_call(threads):
        chosen.layer_gram(_table(layer, base), gram)
    return gram


def layer_merge(
    base: Sequence[Any] | None,
    models: Sequence[Sequence[Any]],
    coefficients: Any,
    out: Sequence[Any] | None = None,
    *,
    dtype: str = "keep",
    threads: int | None = None,
    backend: str = "auto",
) -> list[Any]:
    """Return ``base + Σ_t c_t (model_t − base)`` for every tensor (arXiv 2406.11385, Eq. 2).

        out = rne(fma(c_{T-1}, τ_{T-1}, ... fma(c_0, τ_0, base)))

    in fp32 with coefficients rounded to fp32 and one rounding to the output's dtype; all in fp64 if an operand or
    the output is float64. Without a base, ``Σ_t c_t model_t``. Same bits on every machine, NaN payloads apart.

    Args:
        base: K arrays, or None.
        models: T lists of K arrays.
        coefficients: ``[T]``, or one row per tensor ``[K, T]``; for tensors on a GPU they may be a tensor there.
        out: K arrays to write into, which may be the base's or a model's own if the dtype is the same; default new
            ones like the base's (or the first model's).
        dtype: of new arrays: ``keep``, ``bf16``, ``f16``, ``f32``, ``f64``; not with ``out``.
        threads: threads for this call; default see :func:`metagpt_fast.set_num_threads`.
        backend: ``auto``, ``cpu`` or ``reference``; for tensors on a GPU ``auto`` or ``triton``.

    Returns:
        ``out``, or the new arrays, of the library that the base's are of.

    Raises:
        RecipeError: an array cannot be used as it is, or the arrays do not fit each other.
        BackendError: there is no such backend, or it cannot be used for these arrays.
    """
    layer = _layer(base, models)
    chosen = make_backend(backend, layer[0][0].device if layer else CPU)
    is_tensor = isinstance(chosen, DeviceBackend) and hasattr(coefficients, "data_ptr")
    weights = coefficients if is_tensor else _numbers(coefficients)
    _check_coefficients(tuple(weights.shape), len(layer), len(models))
    if out is None:
        wanted = parse_output_dtype(dtype)
        results = [empty_like(row[0].owner, wanted or row[0].dtype, f"result {k}") for k, row in enumerate(layer)]
    else:
        if dtype != "keep":
            raise RecipeError("dtype and out exclude each other", where="dtype", got=repr(dtype))
        results = list(out)
        if len(results) != len(layer):
            raise RecipeError("number of arrays", where="out", got=len(results), expected=len(layer))
    if not layer:
        return results
    outputs = [view(array, f"out[{k}]", writable=True) for k, array in enumerate(results)]
    for k, (output, row) in enumerate(zip(outputs, layer, strict=True)):
        if output.numel != row[0].numel:
            raise RecipeError("number of elements", where=f"out[{k}]", got=output.numel, expected=row[0].numel)
    common_device([("base[0]" if base is not None else "models[0][0]", layer[0][0]), *_named(outputs)])
    table, out_table = _table(layer, base), output_table([output.place for output in outputs])
    if isinstance(chosen, DeviceBackend):
        chosen.merge_on_device(table, weights, out_table)
        return results
    shape = (len(layer), len(models))
    with threads_for_call(threads):
        chosen.layer_merge(table, np.ascontiguousarray(np.broadcast_to(weights, shape)), out_table)
    return results


def _layer(base: Sequence[Any] | None, models: Sequence[Sequence[Any]]) -> list[list[ArrayView]]:
    """Return the views by tensor, ``[K][V]``, checked against each other."""
    if not models:
        raise RecipeError("no models were given", where="models", expected="at least one list of arrays")
    columns = [] if base is None else [("base", base)]
    columns += [(f"models[{t}]", arrays) for t, arrays in enumerate(models)]
    num_tensors = len(columns[0][1])
    for name, arrays in columns:
        if len(arrays) != num_tensors:
            raise RecipeError(
                "number of arrays",
                where=name,
                got=len(arrays),
                expected=f"{num_tensors}, as {columns[0][0]} has",
            )
    layer = []
    for k in range(num_tensors):
        row = [view(arrays[k], f"{name}[{k}]") for name, arrays in columns]
        for (name, _), each in zip(columns, row, strict=True):
            if each.shape != row[0].shape:
                raise RecipeError(
                    "shape",
                    where=f"{name}[{k}]",
                    got=list(each.shape),
                    expected=f"{list(row[0].shape)}, as {columns[0][0]}[{k}] has",
                )
        layer.append(row)
    names = [f"{name}[{k}]" for k in range(num_tensors) for name, _ in columns]
    common_device(zip(names, (each for row in layer for each in row), strict=True))
    return layer


def _table(layer: Sequence[Sequence[ArrayView]], base: Sequence[Any] | None) -> LayerTable:
    places = [[each.place for each in row] for row in layer]
    return layer_table(places, [row[0].numel for row in layer], base is not None)


def _named(outputs: Sequence[ArrayView]) -> Iterator[tuple[str, ArrayView]]:
    return ((f"out[{k}]", output) for k, output in enumerate(outputs))


def _numbers(coefficients: Any) -> FloatArray:
    try:
        return np.asarray(coefficients, np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"not numbers ({error})", where="coefficients") from error


def _check_coefficients(shape: tuple[int, ...], num_tensors: int, num_models: int) -> None:
    if shape not in {(num_models,), (num_tensors, num_models)}:
        raise RecipeError(
            "shape",
            where="coefficients",
            got=list(shape),
            expected=f"[{num_models}] (one per model) or [{num_tensors}, {num_models}] (one row per tensor)",
        )


@contextlib.contextmanager
def threads_for_call(threads: int | None) -> Iterator[None]:
    """Run with this number of threads, then go back to what was set."""
    if threads is None:
        yield
        return
    before = _native.num_threads()
    _native.set_num_threads(threads)
    try:
        yield
    finally:
        _native.set_num_threads(before)
