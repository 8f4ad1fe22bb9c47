"""The C++ tests of the kernels, built with sanitizers; and on another architecture, where it can be emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from .tools import configure, cxx_compiler, run_checked, tool

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

CPP_TESTS = ("-DMETAGPT_FAST_PYTHON=OFF", "-DMETAGPT_FAST_TESTS=ON")
# -Og builds in half the time of -O1 with sanitizers, and runs fast enough.
QUICK_BUILD = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-Og")
# What ThreadSanitizer can find something in. It cannot follow a fork of a process with threads.
THREADED = ("thread_pool", "threads_around_kernels", "layer_nonfinite", "file_operands", "mapped_files")
# qemu-user cannot start threads in a forked child.
EMULATED = ("crc32c", "golden_bits", "float_bits", "layer_arguments", "thread_pool")


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


def build_and_run(build, options, tests=(), launcher=(), **environment):
    configured = configure(build, *CPP_TESTS, *QUICK_BUILD, *options)
    assert configured.returncode == 0, configured.stdout
    num_jobs = len(os.sched_getaffinity(0))
    run_checked([tool("cmake"), "--build", build, "--parallel", str(num_jobs)], timeout=600)
    output = run_checked([*launcher, build / "test_kernels", *tests], timeout=600, **environment)
    assert re.search(r"^[1-9]\d* passed, 0 failed$", output, re.MULTILINE), output


@pytest.mark.parametrize(
    ("sanitizers", "tests"), [("address,undefined", ()), ("thread", THREADED)], ids=["address", "thread"]
)
def test_sanitizers_find_nothing(sanitizers, tests, tmp_path):
    skip_without_runtime(sanitizers, tmp_path)
    build_and_run(tmp_path / "build", [f"-DMETAGPT_FAST_SANITIZE={sanitizers}"], tests)


@pytest.mark.slow
def test_neon_gives_the_same_bits(tmp_path):
    """Needs `apt-get install g++-aarch64-linux-gnu qemu-user`."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    options = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ]
    build_and_run(tmp_path, options, EMULATED, launcher=[emulator])
