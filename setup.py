"""Builds the extension modules with CMake. Everything else is declared in pyproject.toml.

Environment: METAGPT_FAST_CUDA=AUTO|ON|OFF chooses whether the CUDA module is built (default AUTO: if a toolkit is
found), CMAKE_ARGS is handed to CMake.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake once; every extension module that it builds lands beside the package's Python files."""

    def run(self) -> None:
        """Configure and build."""
        target = Path(self.get_ext_fullpath("metagpt_fast._core")).resolve().parent
        build = Path(self.build_temp).resolve()
        target.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        # It names the ninja and the pybind11 of pip's build environment, which is gone after every build.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMETAGPT_FAST_CUDA={os.environ.get('METAGPT_FAST_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(
                    "metagpt_fast: CMake failed, for the reason above. The build needs a C++20 compiler: GCC 11 or "
                    "Clang 14, or later (Debian, Ubuntu: apt-get install g++)."
                )


setup(
    packages=[
        "metagpt_fast",
        "metagpt_fast.backends",
        "metagpt_fast.benchmarking",
        "metagpt_fast.integrations",
        "metagpt_fast.kernels",
        "metagpt_fast.methods",
        "metagpt_fast.operations",
        "metagpt_fast.page",
    ],
    package_dir={"metagpt_fast.kernels": "kernels"},
    package_data={"metagpt_fast": ["py.typed"], "metagpt_fast.page": ["style.css"]},
    ext_modules=[Extension("metagpt_fast._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
