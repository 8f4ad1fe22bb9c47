"""Programs that the tests run: those of the `test` extra, and what a C++ build needs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> str:
    """Return the path of a program of the `test` extra: beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; it comes with `pip install '.[test]'`"
    return found


def run(command: Sequence[str | Path], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository's root, with stdout and stderr as one text."""
    return subprocess.run(
        list(command),
        cwd=ROOT,
        env=os.environ | environment,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def run_checked(command: Sequence[str | Path], timeout: float = 300, **environment: str) -> str:
    """Run a program that must succeed; its output becomes the failure's message."""
    finished = run(command, timeout, **environment)
    assert finished.returncode == 0, f"{' '.join(map(str, command))}: status {finished.returncode}\n{finished.stdout}"
    return finished.stdout


@functools.cache
def cxx_compiler() -> str | None:
    """Return the C++ compiler that CMake will find, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run CMake's configure step into the folder `build`."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    return run([tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", ninja, *options])
