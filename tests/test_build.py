"""What the build promises: no foreign libraries, no machine-dependent flags, CUDA absent politely."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pybind11
import pytest

import metagpt_fast
from metagpt_fast import _native

from .elf import needed_libraries
from .tools import ROOT, configure, cxx_compiler

MODULES = sorted(Path(_native.__file__).parent.glob("*.so"))
# The C and C++ run times, which every machine that runs this Python has.
ALLOWED = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux[-\w]*\.so\.\d+")
needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_link_only_run_times(module):
    libraries = needed_libraries(module)
    assert libraries
    assert not [name for name in libraries if not ALLOWED.fullmatch(name)], libraries


def test_the_kernels_are_a_module():
    assert [path for path in MODULES if path.name.startswith("_core.")], metagpt_fast.__path__


def test_every_package_is_installed():
    """An editable install, which these tests run in, would not notice."""
    text = (ROOT / "setup.py").read_text()
    listed = set(re.findall(r'"([\w.]+)"', re.search(r"packages=\[(.*?)\]", text, re.DOTALL)[1]))
    elsewhere = dict(re.findall(r'"([\w.]+)": "(\w+)"', re.search(r"package_dir={(.*?)}", text)[1]))
    assert all((ROOT / folder / "__init__.py").exists() for folder in elsewhere.values())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "metagpt_fast").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | set(elsewhere)


@pytest.mark.parametrize("flag", ["-march", "-mtune", "-mavx", "-ffast-math", "-Ofast", "-funsafe-math"])
def test_no_flags_that_change_machine_or_arithmetic(flag):
    lines = (ROOT / "CMakeLists.txt").read_text().splitlines()
    assert not [line for line in lines if flag in line.partition("#")[0]]


def configure_without_toolkit(build, choice):
    options = [
        f"-DMETAGPT_FAST_CUDA={choice}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON",
    ]
    return configure(build, *options)


@needs_compiler
@pytest.mark.parametrize("choice", ["OFF", "AUTO"])
def test_configures_without_cuda(choice, tmp_path):
    configured = configure_without_toolkit(tmp_path, choice)
    assert configured.returncode == 0, configured.stdout
    assert ("CUDA module: left out" in configured.stdout) == (choice == "AUTO"), configured.stdout


@needs_compiler
def test_cuda_on_without_a_toolkit_is_an_error(tmp_path):
    configured = configure_without_toolkit(tmp_path, "ON")
    assert configured.returncode != 0
    text = " ".join(configured.stdout.split())
    problem = "no CUDA toolkit from 12.0 on, with nvcc and a static runtime, was found."
    assert f"METAGPT_FAST_CUDA=ON, but {problem}" in text, configured.stdout
    assert "Set CUDAToolkit_ROOT, or build with METAGPT_FAST_CUDA=AUTO or OFF." in text, configured.stdout
