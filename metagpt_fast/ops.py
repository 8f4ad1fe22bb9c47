"""The kernels for arrays and tensors in memory: NumPy, ml_dtypes, torch and whatever else speaks DLPack.

A layer is a list of K tensors; ``base[k]`` and ``models[t][k]`` have the same number of elements. Arrays are read in
place, whatever their alignment, and have to be contiguous (C order) and on the CPU. Dtypes float32, float16, bfloat16
(``ml_dtypes``, ``torch``) and float64 may be mixed freely.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from .backends import make_backend
from .backends.tables import MEMORY, Place, layer_table, output_table
from .dtypes import BF16, F16, F32, F64, DType, parse_output_dtype
from .errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["layer_gram", "layer_merge"]

_DTYPE_OF_NUMPY = {"float32": F32, "float16": F16, "float64": F64, "bfloat16": BF16}
_DLPACK_FLOAT, _DLPACK_BFLOAT = 2, 4
_DTYPE_OF_DLPACK = {
    (_DLPACK_FLOAT, 32): F32,
    (_DLPACK_FLOAT, 16): F16,
    (_DLPACK_FLOAT, 64): F64,
    (_DLPACK_BFLOAT, 16): BF16,
}
_DLPACK_CPU = 1


@dataclass(frozen=True)
class ArrayView:
    """An array's memory, as the kernels take it; holds on to its owner."""

    address: int
    dtype: DType
    shape: tuple[int, ...]
    owner: Any

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def place(self) -> Place:
        """Return the memory as the backends' tables take it."""
        assert self.dtype.code is not None  # view() makes views of mergeable dtypes only
        return (self.address, MEMORY, self.dtype.code)


def layer_gram(
    base: Sequence[Any] | None,
    models: Sequence[Sequence[Any]],
    *,
    threads: int | None = None,
    backend: str = "auto",
) -> FloatArray:
    """Return the Gram matrix of ``[base, τ_1 ... τ_T]`` for every tensor, τ_t = model_t − base.

        gram[k, i, j] = Σ_e v_i[e] v_j[e]

    The squared norms on its diagonal give MetaGPT's λ (arXiv 2406.11385, Eq. 15). Deltas in fp32, sums over blocks of
    4096 elements in fp32 lanes and across blocks in fp64; all in fp64 for a tensor with a float64 operand. Same bits
    for any number of threads and any instruction set. NaN and Inf follow IEEE.

    Args:
        base: K arrays; None takes the models themselves for v.
        models: T lists of K arrays.
        threads: threads for this call; default see :func:`metagpt_fast.set_num_threads`.
        backend: ``auto``, ``cpu`` or ``reference``.

    Returns:
        float64 ``[K, T+1, T+1]``, or ``[K, T, T]`` without a base.

    Raises:
        RecipeError: an array cannot be used as it is, or the arrays do not fit each other.
        BackendError: there is no such backend.
    """
    layer = _layer(base, models)
    num_operands = len(layer[0]) if layer else len(models) + (base is not None)
    gram = np.zeros((len(layer), num_operands, num_operands))
    if layer:
        table = layer_table(
            [[view.place for view in row] for row in layer], [row[0].numel for row in layer], base is not None
        )
        with threads_for_call(threads):
            make_backend(backend).layer_gram(table, gram)
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
        coefficients: ``[T]``, or one row per tensor ``[K, T]``.
        out: K arrays to write into, which may be the base's or a model's own if the dtype is the same; default new
            ones like the base's (or the first model's).
        dtype: of new arrays: ``keep``, ``bf16``, ``f16``, ``f32``, ``f64``; not with ``out``.
        threads: threads for this call; default see :func:`metagpt_fast.set_num_threads`.
        backend: ``auto``, ``cpu`` or ``reference``.

    Returns:
        ``out``, or the new arrays, of the library that the base's are of.

    Raises:
        RecipeError: an array cannot be used as it is, or the arrays do not fit each other.
        BackendError: there is no such backend.
    """
    layer = _layer(base, models)
    weights = _coefficients(coefficients, len(layer), len(models))
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
    table = layer_table(
        [[each.place for each in row] for row in layer], [row[0].numel for row in layer], base is not None
    )
    with threads_for_call(threads):
        make_backend(backend).layer_merge(table, weights, output_table([output.place for output in outputs]))
    return results


def view(array: Any, where: str, *, writable: bool = False) -> ArrayView:
    """Return the memory of an array that the kernels can use in place.

    Raises:
        RecipeError: not an array, another device or dtype, not contiguous, or (``writable``) read-only.
    """
    if isinstance(array, np.ndarray):
        return _numpy_view(array, where, writable=writable)
    if not hasattr(array, "__dlpack__"):
        raise RecipeError(
            "not an array",
            where=where,
            got=type(array).__name__,
            expected="a NumPy array or a tensor with DLPack",
        )
    if getattr(array, "requires_grad", False):
        array = array.detach()
    try:
        device_type = int(array.__dlpack_device__()[0])
    except (RuntimeError, BufferError, TypeError, ValueError) as error:  # torch's meta tensors have no memory
        raise RecipeError(f"cannot be used through DLPack ({error})", where=where) from error
    if device_type != _DLPACK_CPU:
        raise RecipeError(
            "the tensor is not in CPU memory", where=where, got=str(getattr(array, "device", device_type)),
            expected="cpu", hint="move it with .cpu()",
        )  # fmt: skip
    try:
        capsule = array.__dlpack__()
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        raise RecipeError(f"cannot be used through DLPack ({error})", where=where) from error
    address, (code, bits, lanes), shape, strides, _ = _native.inspect_dlpack(capsule)
    dtype = _DTYPE_OF_DLPACK.get((code, bits)) if lanes == 1 else None
    if dtype is None:
        raise _wrong_dtype(where, getattr(array, "dtype", (code, bits, lanes)))
    if strides is not None and not _is_contiguous(shape, strides):
        raise _not_contiguous(where)
    return ArrayView(address, dtype, shape, (array, capsule))


def empty_like(owner: Any, dtype: DType, where: str) -> Any:
    """Return a new array of ``dtype`` with the shape, and of the library, of an array or a view's owner."""
    like = owner[0] if isinstance(owner, tuple) else owner
    if isinstance(like, np.ndarray):
        return np.empty(like.shape, _numpy_dtype(dtype, where))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(like.shape, dtype=getattr(torch, str(dtype.torch_name)))
    raise RecipeError(
        "no way is known to make a new array of this kind",
        where=where,
        got=type(like).__name__,
        hint="give the arrays to write into as out=",
    )


def _numpy_view(array: NDArray[Any], where: str, *, writable: bool) -> ArrayView:
    dtype = _DTYPE_OF_NUMPY.get(array.dtype.name) if array.dtype.isnative else None
    if dtype is None:
        raise _wrong_dtype(where, array.dtype)
    if not array.flags.c_contiguous:
        raise _not_contiguous(where)
    if writable and not array.flags.writeable:
        raise RecipeError("the array is read-only", where=where)
    return ArrayView(array.ctypes.data, dtype, array.shape, array)


def _numpy_dtype(dtype: DType, where: str) -> Any:
    if dtype.numpy_name is not None:
        return np.dtype(dtype.numpy_name)
    try:
        import ml_dtypes
    except ImportError:
        raise RecipeError(
            "NumPy has no bfloat16 of its own",
            where=where,
            hint="install ml_dtypes, or choose another dtype or out=",
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


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
    return layer


def _coefficients(coefficients: Any, num_tensors: int, num_models: int) -> FloatArray:
    try:
        weights = np.asarray(coefficients, np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"not numbers ({error})", where="coefficients") from error
    if weights.shape not in {(num_models,), (num_tensors, num_models)}:
        raise RecipeError(
            "shape",
            where="coefficients",
            got=list(weights.shape),
            expected=f"[{num_models}] (one per model) or [{num_tensors}, {num_models}] (one row per tensor)",
        )
    return np.ascontiguousarray(np.broadcast_to(weights, (num_tensors, num_models)))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _not_contiguous(where: str) -> RecipeError:
    return RecipeError(
        "the array is not contiguous in C order",
        where=where,
        hint="use numpy.ascontiguousarray or tensor.contiguous() first",
    )


def _wrong_dtype(where: str, dtype: object) -> RecipeError:
    return RecipeError(
        "dtype", where=where, got=dtype, expected="float32, float16, bfloat16 or float64 in native byte order"
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
