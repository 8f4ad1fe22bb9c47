"""Backends: what carries out the kernels. A new one is a class with the Backend interface, listed here."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BackendError
from .cpu import CpuBackend
from .tables import Backend, DeviceBackend

__all__ = ["Backend", "DeviceBackend", "make_backend"]


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


def _triton(device: str) -> Backend:
    from .triton import TritonBackend

    return TritonBackend(device)


_ON_CPU: dict[str, Callable[[], Backend]] = {"cpu": CpuBackend, "reference": _reference}
_ON_DEVICES: dict[str, Callable[[str], Backend]] = {"triton": _triton}


def make_backend(name: str = "auto", device: str | None = None) -> Backend:
    """Return the backend ``name``; ``auto`` is the fastest for where the weights are.

    Args:
        name: ``auto``, ``cpu``, ``reference`` or ``triton``.
        device: where all operands and outputs are: ``cpu``, or torch's name of a GPU, such as ``cuda:0``; None for
            files.

    Raises:
        BackendError: there is no such backend, or it cannot reach the weights.
    """
    is_on_gpu = device not in {None, "cpu"}
    if name == "auto":
        name = "triton" if is_on_gpu else "cpu"
    if name in _ON_DEVICES:
        if device is None:
            raise BackendError(
                "the backend merges tensors that are in GPU memory, not files",
                where="backend",
                got=repr(name),
                expected="auto, " + ", ".join(_ON_CPU),
                hint="for tensors on a GPU use metagpt_fast.merge_state_dicts",
            )
        return _ON_DEVICES[name](device)
    if name not in _ON_CPU:
        expected = ", ".join(["auto", *_ON_CPU, *_ON_DEVICES])
        raise BackendError("unknown backend", where="backend", got=repr(name), expected=expected)
    if is_on_gpu:
        raise BackendError(
            "the backend does not reach the memory of a GPU",
            where="backend",
            got=f"{name!r} for tensors on {device}",
            expected="auto, " + ", ".join(_ON_DEVICES),
            hint="leave the backend out, or move the tensors with .cpu()",
        )
    return _ON_CPU[name]()
