"""What this machine and installation offer: versions, processor, memory, kernels, GPUs, backends and why not.

Linux is where limits of containers are looked up; elsewhere those facts are None.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import MetagptFastError

# Installed or not, these are asked for by their metadata alone: importing torch takes seconds.
_PACKAGES = ("numpy", "safetensors", "torch", "triton", "transformers")
_CGROUPS = Path("/sys/fs/cgroup")


def collect() -> dict[str, Any]:
    """Return everything ``metagpt-fast info`` shows, in plain types that JSON has."""
    kernels = _kernels()
    gpus, cuda = _gpus()
    versions = _versions()
    return {
        "versions": versions,
        "machine": _machine(),
        "kernels": kernels,
        "gpus": gpus,
        "backends": {
            "cpu": "available" if "error" not in kernels else f"not available: {kernels['error']}",
            "reference": "available (NumPy; slow, for checking)",
            "cuda": cuda,
            "triton": _triton(versions, gpus),
        },
    }


def _triton(versions: dict[str, str | None], gpus: list[dict[str, object]] | str) -> str:
    """Return whether tensors on a GPU can be merged, by what is installed: torch is not asked, it takes seconds."""
    missing = [package for package in ("torch", "triton") if versions[package] is None]
    if missing:
        return f"not available: {' and '.join(missing)} not installed"
    build = versions["torch"] or ""
    if "+cpu" in build:
        return f"not available: torch {build} was built without CUDA and ROCm"
    if "+rocm" in build:
        return "installed (ROCm; AMD's GPUs are not looked for here)"
    if isinstance(gpus, str):
        return f"installed, for tensors on a GPU; none is known of: {gpus}"
    return "available for tensors on a GPU (merge_state_dicts, ops)"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "metagpt_fast": __version__,
        "python": platform.python_version(),
    }
    versions.update({name: _version(name) for name in _PACKAGES})
    return versions


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = _meminfo()
    return {
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "num_cores_usable": num_cores_usable(),
        "cgroup_core_limit": _cgroup_core_limit(),
        "memory_nbytes": memory.get("MemTotal"),
        "memory_available_nbytes": memory.get("MemAvailable"),
        "cgroup_memory_limit_nbytes": _cgroup_memory_limit(memory.get("MemTotal")),
    }


def num_cores_usable() -> int:
    """Return how many cores this process may run on (its CPU affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kernels() -> dict[str, Any]:
    """Ask the compiled kernels; a broken build or a bad METAGPT_FAST_ISA is a fact to show, not a failure."""
    environment = {name: os.environ.get(name) for name in ("METAGPT_FAST_ISA", "METAGPT_FAST_THREADS")}
    facts: dict[str, Any] = {}
    try:
        from . import _native

        facts["supported_isas"] = _native.supported_isas()
        facts["isa"] = _native.isa()
        facts["num_threads"] = _native.num_threads()
    except MetagptFastError as error:
        facts["error"] = str(error)
    facts["environment"] = {name: value for name, value in environment.items() if value is not None}
    return facts


def _gpus() -> tuple[list[dict[str, Any]] | str, str]:
    """Return the GPUs, or why there are none, and whether a merge can use them."""
    try:
        from .backends import cuda_device

        devices = cuda_device.list_devices()
        versions = cuda_device.versions()
    except MetagptFastError as error:
        reason = str(error).removeprefix(f"{error.where}: ")  # "device", which is an option of other commands
        return reason, f"not available: {reason}"
    return devices, f"available (--device cuda; driver for CUDA {versions['driver']}, built with {versions['runtime']})"


def _cpu_model() -> str:
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _meminfo() -> dict[str, int]:
    """Return the fields of /proc/meminfo in bytes."""
    fields = {}
    for line in _read_text(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    return fields


def _cgroup_core_limit() -> float | None:
    """Return the cores' worth of time that a container's quota allows, None without a quota."""
    limits = []
    for folder in _cgroup_folders("cpu"):
        both = _read_text(folder / "cpu.max").split()  # version 2: "quota period"
        both = both or [_read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(text.isdigit() and int(text) > 0 for text in both):  # "max" and -1 mean no limit
            limits.append(int(both[0]) / int(both[1]))
    return min(limits, default=None)


def _cgroup_memory_limit(memory_nbytes: int | None) -> int | None:
    """Return the memory in bytes that a container may use, None where that is all of ``memory_nbytes``."""
    limits = [
        int(text)
        for folder in _cgroup_folders("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read_text(folder / name).strip()).isdigit()
    ]
    limit = min(limits, default=None)
    return None if limit is None or memory_nbytes is None or limit >= memory_nbytes else limit


def _cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of all above it; each can set a limit."""
    folders: list[Path] = []
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", maxsplit=2)
        if ".." in path or not (number == "0" or controller in controllers.split(",")):
            continue
        root = _CGROUPS if number == "0" else _CGROUPS / controller
        folder = root / path.strip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return folders


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if sys.platform == "linux" else ""
    except OSError:
        return ""
