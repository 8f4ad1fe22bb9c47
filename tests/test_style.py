"""Formatting, lint and types, each as a test whose failure is the tool's own output."""

from __future__ import annotations

from .tools import ROOT, run_checked, tool

CPP_SOURCES = sorted(
    path
    for folder in ("csrc", "tests/cpp")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".cpp", ".h", ".cu", ".cuh"}
)


def test_python_is_formatted():
    run_checked([tool("ruff"), "format", "--check", "--diff", "."])


def test_python_has_no_lint():
    run_checked([tool("ruff"), "check", "."])


def test_types():
    run_checked([tool("mypy")])


def test_cpp_is_formatted():
    assert CPP_SOURCES
    run_checked([tool("clang-format"), "--dry-run", "-Werror", *CPP_SOURCES])
