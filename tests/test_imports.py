"""Imports go one way, from the command down to errors and dtypes; and the heavy ones wait until they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metagpt_fast
import metagpt_fast.kernels

PACKAGE = Path(metagpt_fast.__file__).parent

# Every module, in the layers of docs/design.md: one may import from lower layers, and within its own without a cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("integrations", "cli", "cli_bench", "cli_errors", "cli_inspect", "cli_options", "cli_verify"),
    (
        "demo",
        "benchmarking",
        "console",
        "progress",
        "tables",
        "method_tables",
        "table_parts",
        "cli_output",
        "verify_tables",
    ),
    ("page",),
    ("verifying",),
    ("recomputing", "recorded_merge"),
    ("merging", "state_dicts", "recipe_plan"),
    ("reporting", "jobs"),
    ("layer_pass", "pass_journal", "buffers", "nonfinite", "schedule"),
    ("artifacts", "model_card", "report", "record", "verify_report"),
    ("plan", "plan_checks", "recipe", "measurement", "trust", "family", "input_files", "ops"),
    ("array_views",),
    ("recipe_methods", "recipe_tensors", "recipe_parameters", "recipe_file"),
    ("writer", "recorder", "shard_files", "build_folder", "output_target", "output_shards", "checksums"),
    ("info", "operations", "devices"),
    ("checkpoint", "backends", "methods"),
    ("reference_threshold", "reference_moments", "reference_elect"),
    ("reference_masks", "reference_rows"),
    ("reference", "safetensors_file", "pickle_file", "recipe_schema"),
    ("recipe_yaml",),
    ("untrusted", "quantities", "dtypes", "layer_names", "journal", "page_cache", "_native"),
    ("errors", "_version", "kernels"),
)
LEVELS = {module: -level for level, modules in enumerate(LAYERS) for module in modules}
COMPILED = {"_core", "_cuda"}
# In a checkout the package's part kernels/ lies beside it.
KERNELS = Path(metagpt_fast.kernels.__file__).parent
ROOTS = {
    path: folder for folder, part in ((PACKAGE, PACKAGE), (KERNELS.parent, KERNELS)) for path in part.rglob("*.py")
}


def module_of(path: Path) -> str:
    """The module, or the subpackage, that a file belongs to."""
    return path.relative_to(ROOTS[path]).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the package's modules that a file imports, and whether that happens when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    depth = len(path.relative_to(ROOTS[path]).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            yield from ((name, node in tree.body) for name in names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0] == "metagpt_fast" for name in names), f"{path}: use relative imports"


FILES = [path for path in sorted(ROOTS) if path != PACKAGE / "__init__.py"]
GRAPH: dict[str, set[str]] = {}
for _path in FILES:
    GRAPH.setdefault(module_of(_path), set()).update(name for name, _ in imports_of(_path))


def test_every_module_has_a_layer():
    assert {module_of(path) for path in FILES} == set(LEVELS)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_a_module_imports_from_its_layer_and_below(module):
    upward = {name for name in GRAPH[module] - COMPILED - {module} if LEVELS[name] > LEVELS[module]}
    assert not upward


def test_there_are_no_cycles():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above, module))
        if module not in done:
            for name in sorted(GRAPH.get(module, set()) - {module}):
                visit(name, (*above, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_only_adapters_name_torch():
    """Others meet tensors through DLPack. Backends for GPUs and the reader of torch files import it where they run."""
    named = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            named |= {(module_of(path), name) for name in names if name.split(".")[0] in {"torch", "transformers"}}
    others = {(module, name) for module, name in named if module != "integrations"}
    assert others == {("backends", "torch"), ("pickle_file", "torch")}


def test_importing_the_package_is_cheap():
    code = """
import sys, time
heavy = ("numpy", "torch", "rich", "click", "safetensors", "triton", "yaml", "pydantic")
started = time.perf_counter()
import metagpt_fast
seconds = time.perf_counter() - started
print(seconds, [name for name in heavy if name in sys.modules])
"""

    def run() -> float:
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
        seconds, _, heavy = finished.stdout.partition(" ")
        assert heavy == "[]\n"
        return float(seconds)

    assert min(run() for _ in range(3)) < 0.2


def test_every_public_name_is_there():
    for name in metagpt_fast.__all__:
        assert getattr(metagpt_fast, name) is not None
    assert sorted(metagpt_fast.__all__, key=str.lower) == sorted(set(metagpt_fast.__all__), key=str.lower)
    assert not hasattr(metagpt_fast, "nonsense")
