"""Backends: what carries out the kernels. A new one is a class with the Backend interface, listed here."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BackendError
from .cpu import CpuBackend
from .tables import Backend

__all__ = ["Backend", "make_backend"]


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


_BACKENDS: dict[str, Callable[[], Backend]] = {"cpu": CpuBackend, "reference": _reference}


def make_backend(name: str = "auto") -> Backend:
    """Return the backend ``name``; ``auto`` is the fastest that this machine has, today always ``cpu``.

    Raises:
        BackendError: there is no such backend.
    """
    if name == "auto":
        name = "cpu"
    if name not in _BACKENDS:
        raise BackendError("unknown backend", where="backend", got=repr(name), expected="auto, " + ", ".join(_BACKENDS))
    return _BACKENDS[name]()
