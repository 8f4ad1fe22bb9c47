"""Formatting, lint and types, each as a test whose failure is the tool's own output."""

from __future__ import annotations

from .tools import ROOT, run_checked, tool

CPP_SOURCES = sorted(
    path for folder in ("csrc", "tests/cpp") for path in (ROOT / folder).rglob("*") if path.suffix in {".cpp", ".h"}
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


def test_files_are_short():
    """One idea per file: if you scroll to find the main function, split it."""
    too_long = {}
    for folder in ("metagpt_fast", "tests", "bench", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h"}:
                num_lines = len(path.read_text().splitlines())
                if num_lines >= 400:
                    too_long[str(path.relative_to(ROOT))] = num_lines
    assert not too_long
