"""The C++ code with sanitizers inside, in its own tests and in whole merges; and where it can be emulated, on ARM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from .tools import ROOT, configure, cxx_compiler, run_checked, tool

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

# -Og builds in half the time of -O1 with sanitizers, and runs fast enough.
QUICK_BUILD = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-Og", "-DMETAGPT_FAST_TESTS=ON")
# What ThreadSanitizer can find something in. It cannot follow a fork of a process with threads.
THREADED = ("thread_pool", "threads_around_kernels", "layer_nonfinite", "file_operands", "mapped_files")
# qemu-user cannot start threads in a forked child.
EMULATED = ("crc32c", "golden_bits", "float_bits", "layer_arguments", "thread_pool")
# Python is not built for sanitizers: theirs has to be there first. Memory that is Python's own is not of interest, but
# has to be malloc's, so that what it refers to is found.
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
IN_PYTHON = {
    "PYTHONMALLOC": "malloc",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ASAN_OPTIONS": "detect_leaks=1:leak_check_at_exit=0:detect_stack_use_after_return=1",
    "LSAN_OPTIONS": "print_suppressions=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def skip_without_runtime(sanitizers, folder):
    """Skip where the compiler comes without the sanitizer's run-time library, or this kernel cannot run it."""
    program = folder / "probe"
    command = [cxx_compiler(), "-x", "c++", "-", f"-fsanitize={sanitizers}", "-o", str(program)]
    built = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    if built.returncode != 0:
        pytest.skip(f"the compiler has no -fsanitize={sanitizers}: {built.stderr.strip()[:300]}")
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"-fsanitize={sanitizers} does not run here: {ran.stderr.strip()[:300]}")


def build(folder, *options):
    configured = configure(folder, *QUICK_BUILD, *options)
    assert configured.returncode == 0, configured.stdout
    num_jobs = len(os.sched_getaffinity(0))
    run_checked([tool("cmake"), "--build", folder, "--parallel", str(num_jobs)], timeout=900)


def run_tests(folder, tests=(), launcher=()):
    output = run_checked([*launcher, folder / "test_kernels", *tests], timeout=600)
    assert re.search(r"^[1-9]\d* passed, 0 failed$", output, re.MULTILINE), output


def copy_package(folder):
    """Copy the package without what is compiled."""
    shutil.copytree(
        ROOT / "metagpt_fast", folder / "metagpt_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder / "metagpt_fast"


def merge_everything(packages, place, sanitizers, *options):
    """Run tests/merge_everything.py with the sanitizer in Python; return what it printed."""
    asked = [cxx_compiler(), f"-print-file-name={RUNTIMES[sanitizers]}"]
    runtime = Path(run_checked(asked).strip())
    if not runtime.is_absolute():
        pytest.skip(f"the compiler comes without {runtime}, which Python has to load first")
    command = [sys.executable, ROOT / "tests/merge_everything.py", place, *options]
    output = run_checked(command, timeout=600, LD_PRELOAD=str(runtime), PYTHONPATH=str(packages), **IN_PYTHON)
    assert str(packages) in output, "another package was tested"
    return output


@pytest.mark.parametrize("sanitizers", RUNTIMES)
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    """In the C++ tests; in merges by every method, each way of reading and instruction set; leaks in 100 merges."""
    skip_without_runtime(sanitizers, tmp_path)
    package = copy_package(tmp_path / "packages")
    build(
        tmp_path / "build",
        f"-DMETAGPT_FAST_SANITIZE={sanitizers}",
        "-DMETAGPT_FAST_CUDA=OFF",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    run_tests(tmp_path / "build", THREADED if sanitizers == "thread" else ())
    repeat = () if sanitizers == "thread" else ("--repeat", "100")
    output = merge_everything(package.parent, tmp_path, sanitizers, *repeat)
    if repeat:
        assert "100 more, no leaks" in output, output
        assert "lost memory is found" in output, output


@pytest.mark.slow
def test_neon_gives_the_same_bits(tmp_path):
    """Needs `apt-get install g++-aarch64-linux-gnu qemu-user`."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    options = [
        "-DMETAGPT_FAST_PYTHON=OFF",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ]
    build(tmp_path, *options)
    run_tests(tmp_path, EMULATED, launcher=[emulator])
