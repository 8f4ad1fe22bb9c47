"""Arrays and tensors in memory as the kernels take them: an address, a dtype, a shape and where that is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native
from .backends.tables import MEMORY, Place
from .dtypes import BF16, F16, F32, F64, DType
from .errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPE_OF_NUMPY = {"float32": F32, "float16": F16, "float64": F64, "bfloat16": BF16}
_DLPACK_FLOAT, _DLPACK_BFLOAT = 2, 4
_DTYPE_OF_DLPACK = {
    (_DLPACK_FLOAT, 32): F32,
    (_DLPACK_FLOAT, 16): F16,
    (_DLPACK_FLOAT, 64): F64,
    (_DLPACK_BFLOAT, 16): BF16,
}
_DTYPE_OF_TORCH = {f"torch.{dtype.torch_name}": dtype for dtype in (F32, F16, BF16, F64)}
_DLPACK_CPU = 1
CPU = "cpu"


@dataclass(frozen=True)
class ArrayView:
    """An array's memory, as the kernels take it; holds on to its owner.

    Attributes:
        address: of the first byte, in the device's memory.
        dtype: of the elements.
        shape: of the array, in C order.
        owner: what keeps the memory.
        device: where it is: ``cpu``, or torch's name of a GPU such as ``cuda:0``.
    """

    address: int
    dtype: DType
    shape: tuple[int, ...]
    owner: Any
    device: str = CPU

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
    if getattr(array, "is_cuda", False) is True:
        return _torch_gpu_view(array, where)
    try:
        device_type = int(array.__dlpack_device__()[0])
    except (RuntimeError, BufferError, TypeError, ValueError) as error:  # torch's meta tensors have no memory
        raise RecipeError(f"cannot be used through DLPack ({error})", where=where) from error
    if device_type != _DLPACK_CPU:
        raise RecipeError(
            "the tensor is not in memory that the kernels reach", where=where,
            got=str(getattr(array, "device", device_type)), expected="cpu, or a torch tensor on cuda",
            hint="move it with .cpu(), or, on a GPU, take it over with torch.from_dlpack",
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
        return torch.empty(like.shape, dtype=getattr(torch, str(dtype.torch_name)), device=like.device)
    raise RecipeError(
        "no way is known to make a new array of this kind",
        where=where,
        got=type(like).__name__,
        hint="give the arrays to write into as out=",
    )


def common_device(views: Iterable[tuple[str, ArrayView]]) -> str:
    """Return the one device that all arrays are on; ``cpu`` if there are none.

    Args:
        views: what each is called in a message, and its memory.

    Raises:
        RecipeError: they are on several.
    """
    first: tuple[str, ArrayView] | None = None
    for name, each in views:
        first = first or (name, each)
        if each.device != first[1].device:
            raise RecipeError(
                "the tensors are on several devices",
                where=name,
                got=each.device,
                expected=f"{first[1].device}, where {first[0]} is",
                hint="move them to one device first",
            )
    return CPU if first is None else first[1].device


def _torch_gpu_view(tensor: Any, where: str) -> ArrayView:
    """Return the memory of a torch tensor on a GPU. Not by DLPack, which would order streams that are the same."""
    dtype = _DTYPE_OF_TORCH.get(str(tensor.dtype))
    if dtype is None:
        raise _wrong_dtype(where, tensor.dtype)
    if str(tensor.layout) != "torch.strided" or not tensor.is_contiguous():
        raise _not_contiguous(where)
    address = int(tensor.data_ptr())
    if address == 0 and tensor.numel() > 0:
        raise RecipeError("the tensor has no memory of its own", where=where, got=type(tensor).__name__)
    return ArrayView(address, dtype, tuple(tensor.shape), tensor, str(tensor.device))


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
