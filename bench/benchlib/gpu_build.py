"""The compiled modules on a bare machine: g++ and nvcc, called directly, where pip has nothing to install from."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "metagpt_fast"
# Those of CMakeLists.txt, which is how it is installed otherwise.
CXX_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
NVCC_FLAGS = ("-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden")


class BuildError(Exception):
    """The modules cannot be built; the message says why."""


def find_nvcc() -> str | None:
    """Return nvcc, from PATH or where toolkits are installed."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build_missing(tell: Callable[[str], None]) -> None:
    """Build ``_core`` and ``_cuda`` beside the package's Python files, unless they are there.

    Raises:
        BuildError: a tool is missing, or a command failed.
    """
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    missing = [name for name in ("_core", "_cuda") if not (PACKAGE / f"{name}{suffix}").exists()]
    if missing:
        tell(f"building {' and '.join(missing)} for this machine")
        with tempfile.TemporaryDirectory() as folder:
            for name in missing:
                _build(name, Path(folder), PACKAGE / f"{name}{suffix}")


def _build(name: str, folder: Path, target: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler was found")
    includes = [f"-I{path}" for path in (_pybind11(), sysconfig.get_path("include"), ROOT / "csrc")]
    csrc = ROOT / "csrc"
    libraries: list[str] = ["-lpthread"]
    commands: list[list[str]] = []
    if name == "_core":
        sources = sorted([*csrc.glob("core/*.cpp"), *csrc.glob("cpu/*.cpp"), *csrc.glob("bindings/*.cpp")])
    else:
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("no nvcc was found, on PATH or in /usr/local/cuda/bin")
        toolkit = Path(nvcc).resolve().parents[1]
        for root in (toolkit, Path("/usr/local/cuda")):
            includes += [f"-I{root / part}" for part in ("include", "targets/x86_64-linux/include")]
            libraries += [f"-L{root / part}" for part in ("lib64", "lib", "targets/x86_64-linux/lib")]
        libraries += ["-lcudart_static", "-ldl", "-lrt"]
        sources = [csrc / "cuda/module.cpp"]
        kernels = csrc / "cuda/kernels.cu"
        commands.append([nvcc, *NVCC_FLAGS, "-arch=native", "-c", str(kernels), "-o", str(folder / "kernels.cu.o")])
    for source in sources:
        flags = ["-fno-trapping-math"] if source.name.startswith("isa_") else []
        commands.append([compiler, *CXX_FLAGS, *flags, *includes, "-c", str(source), "-o", _object(folder, source)])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    objects = [command[-1] for command in commands]
    _run([compiler, "-shared", *objects, *libraries, "-o", str(target)])


def _object(folder: Path, source: Path) -> str:
    return str(folder / f"{source.parent.name}-{source.name}.o")


def _pybind11() -> Path:
    """Return the headers of pybind11: its own package's, or those that torch brings."""
    for package, part in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / part
            if (folder / "pybind11" / "pybind11.h").exists():
                return folder
    raise BuildError("the headers of pybind11 were found neither in pybind11 nor in torch")


def _run(command: Sequence[str]) -> None:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if finished.returncode != 0:
        raise BuildError(f"{' '.join(command)}: status {finished.returncode}\n{finished.stdout[-4000:]}")


def run_tests(tell: Callable[[str], None]) -> str:
    """Run the tests that need a GPU; return pytest's last line. Raises BuildError if one fails."""
    tell("tests that need a GPU")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q"]
    finished = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if finished.returncode != 0:
        raise BuildError(f"tests on the GPU: status {finished.returncode}\n{finished.stdout[-6000:]}")
    return finished.stdout.strip().rsplit("\n", 1)[-1]
