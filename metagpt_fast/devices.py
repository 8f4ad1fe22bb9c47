"""Where a merge of files is computed, and why: ``--device``; and by how many threads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _native
from .backends import make_backend
from .errors import BackendError, RecipeError
from .methods import SparseMethod
from .quantities import parse_nbytes

if TYPE_CHECKING:
    from .backends import Backend
    from .backends.device import Device
    from .methods import Method

DEFAULT_DEVICE_MEMORY = "128MiB"
# A device's ring of slices fills and drains once per batch: some 3 slices of 8 MiB.
_DEVICE_BATCH_NBYTES = 1 << 30

_NAME = re.compile(r"auto|cpu|cuda(?::(\d{1,4}))?")
_ON_DEVICE_TOO = ("auto",)  # backends that --device cuda goes with


@dataclass(frozen=True)
class Choice:
    """Attributes: the backend, the device's name (``cpu``, ``cuda:0 (NVIDIA H100)``), why this one, and the bytes
    of base and models from which on larger batches gain no speed there, if these are more than on the CPU.
    """

    backend: Backend
    device: str
    reason: str
    batch_nbytes: int = 0


def check_device(device: str) -> str:
    """Return ``device`` if it is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(device, str) or _NAME.fullmatch(device) is None:
        raise RecipeError("unknown device", where="device", got=repr(device), expected="auto, cpu, cuda or cuda:N")
    return device


@contextmanager
def open_backend(device: str, backend: str, methods: Sequence[Method], device_memory: str | int) -> Iterator[Choice]:
    """Choose where to compute, for weights in files, and open it.

    ``auto`` is the CPU: its linear kernels take less time than reading the files, also from the page cache, and a GPU
    gets their bytes no faster; for methods that prune, nothing has been measured on a GPU. Nothing is asked of a driver
    unless a GPU is asked for.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: name of a backend; a GPU has its own, and takes ``auto`` only.
        methods: those of the tensors to merge; none for a measurement.
        device_memory: memory to take on a GPU, in bytes or as ``"128MiB"``.

    Raises:
        RecipeError: the device or the size is none.
        BackendError: a GPU that was asked for cannot be used; it says why.
    """
    check_device(device)
    nbytes = parse_nbytes(device_memory, where="device_memory")
    if not device.startswith("cuda"):
        reason = "asked for" if device == "cpu" else _reason_for_the_cpu(methods)
        yield Choice(make_backend(backend), "cpu", reason)
        return
    _check_backend(backend)
    from .backends.streamed import StreamedBackend

    opened = _open_device(int(device.partition(":")[2] or 0))
    streamed = StreamedBackend(opened, nbytes)
    try:
        yield Choice(streamed, opened.name, "asked for", _DEVICE_BATCH_NBYTES)
    finally:
        streamed.close()


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Run with this number of threads, then go back to what was set."""
    # Both raise for variables that cannot be used (METAGPT_FAST_ISA, METAGPT_FAST_THREADS) before work starts.
    _native.isa()
    before = _native.num_threads()
    if threads is None:
        yield
        return
    _native.set_num_threads(threads or -1)  # 0 would mean the default
    try:
        yield
    finally:
        _native.set_num_threads(before)


def _open_device(index: int) -> Device:
    from .backends.cuda_device import CudaDevice

    return CudaDevice(index)


def _check_backend(backend: str) -> None:
    if backend not in _ON_DEVICE_TOO:
        raise BackendError(
            "the backend computes on the CPU",
            where="backend",
            got=f"{backend!r} with --device cuda",
            expected="auto",
            hint="leave out one of the two",
        )


def _reason_for_the_cpu(methods: Sequence[Method]) -> str:
    if any(isinstance(method, SparseMethod) for method in methods):
        return "methods that prune have not been measured on a GPU"
    return "a merge from files is bound by reading them"
