"""What the figures were measured on: processor, memory, kernel, file system, disk, versions, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from metagpt_fast import info

ROOT = Path(__file__).resolve().parents[2]
_PROBE_NBYTES = 1 << 30
_CHUNK_NBYTES = 8 << 20
_PACKAGES = ("metagpt_fast", "numpy", "torch", "safetensors", "mergekit")
# Here cp may share blocks instead of copying bytes.
_REFLINK_FILE_SYSTEMS = frozenset({"btrfs", "xfs", "zfs", "bcachefs", "ocfs2", "apfs"})
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return the machine in plain values; nothing that names its host or its owner.

    Args:
        folder: on the file system that the merges are measured on.
    """
    facts = info.collect()
    machine, kernels = facts["machine"], facts["kernels"]
    return {
        "cpu": machine["cpu"],
        "num_cores": machine["num_cores_usable"],
        "isa": kernels["isa"],
        "memory_gib": round(machine["memory_nbytes"] / 2**30, 1) if machine["memory_nbytes"] else None,
        "os": f"{platform.system()} {platform.release().split('-', maxsplit=1)[0]}",
        "file_system": file_system(folder),
        "disk_write_gb_per_s": round(disk_write_gb_per_s(folder), 2),
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions.setdefault("metagpt_fast", info.collect()["versions"]["metagpt_fast"])
    return versions


def result_name(machine: dict[str, Any]) -> str:
    """Return a file name for results of such machines, such as ``cpu-2core-avx512.json``."""
    return f"cpu-{machine['num_cores']}core-{machine['isa']}.json"


def commit() -> str:
    """Return the commit of the source tree, with ``+`` if files differ from it, or ``unknown`` without git."""
    try:
        answers = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answers[0] + ("+" if answers[1] else "")


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds the folder, such as ``ext4``."""
    folder = folder.resolve()
    longest, found = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, kind = line.split()[:3]
        path = Path(point.replace("\\040", " "))
        if folder.is_relative_to(path) and len(path.parts) >= longest:
            longest, found = len(path.parts), kind
    return found


def is_memory_file_system(folder: Path) -> bool:
    """Return whether the folder's files live in memory, so that nothing about disks can be measured there."""
    return file_system(folder) in _MEMORY_FILE_SYSTEMS


def copy_command(source: Path, target: Path) -> list[str]:
    """Return the ``cp`` that moves every byte of a folder, also where the file system could share blocks."""
    shares_blocks = file_system(source) in _REFLINK_FILE_SYSTEMS
    return ["cp", "-r", *(["--reflink=never"] if shares_blocks else []), str(source), str(target)]


def disk_write_gb_per_s(folder: Path) -> float:
    """Return how fast one new file of 1 GiB reaches the disk, fsync included."""
    path = folder / ".disk-write-probe"
    chunk = memoryview(os.urandom(_CHUNK_NBYTES))
    try:
        os.sync()
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            for _ in range(_PROBE_NBYTES // _CHUNK_NBYTES):
                file.write(chunk)
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return _PROBE_NBYTES / seconds / 1e9


def free_nbytes(folder: Path) -> int:
    """Return the free space where the folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory_nbytes() -> int:
    """Return the memory that new processes can have without swapping."""
    available = info.collect()["machine"]["memory_available_nbytes"]
    return int(available) if available else 4 << 30
