"""Memory of one device, by way of torch: tables go up without anybody waiting, scratch comes from torch's allocator."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against_triton() -> str | None:
    """Return why kernels in Triton cannot run here, None if they can. Imports torch only where Triton is installed."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install 'metagpt_fast[gpu]'"
    if is_interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        return "torch finds no GPU" if build else "this torch was built without CUDA and ROCm"
    return None


class DeviceMemory:
    """Tensors on one device, used on the current stream of the calling thread."""

    def __init__(self, device: str) -> None:
        reason = reason_against_triton()
        if reason is not None:
            raise BackendError("the Triton backend cannot run here", where="backend", got="triton", expected=reason)
        import torch

        self._torch = torch
        self.device = torch.device(device)
        if self.device.type == "cpu" and not is_interpreted():
            raise BackendError(
                "the Triton backend works on GPU memory",
                where="backend",
                got="tensors in CPU memory",
                expected="tensors on a GPU",
                hint="leave the backend out, or move the tensors with .cuda()",
            )

    @property
    def warp_size(self) -> int:
        """Return the threads of a warp: 64 on AMD's data-centre GPUs."""
        if self.device.type == "cpu":
            return 32
        return int(self._torch.cuda.get_device_properties(self.device).warp_size)

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy on the device. From pinned memory, so that neither side waits for the other."""
        tensor = self._torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cpu":
            return tensor.clone()
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def zeros(self, shape: tuple[int, ...], dtype: str = "float64") -> Any:
        """Return zeros on the device."""
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: str = "float64") -> Any:
        """Return memory on the device with anything in it."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def adopt(self, values: Any, shape: tuple[int, ...]) -> Any:
        """Return float64 ``shape`` on the device from a tensor there, or from numbers."""
        if isinstance(values, self._torch.Tensor):
            moved = values.detach().to(device=self.device, dtype=self._torch.float64, non_blocking=True)
            return moved.expand(shape).contiguous()
        return self.upload(np.broadcast_to(np.asarray(values, np.float64), shape))

    def current(self) -> Any:
        """Return a context in which this is the current device, as Triton's launcher wants it."""
        return self._torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
