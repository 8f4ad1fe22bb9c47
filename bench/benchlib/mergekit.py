"""How to run mergekit on the same files, as fast as its options allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The fastest combination for these checkpoints, measured with mergekit 0.1.5.
FAST_OPTIONS = ("--async-write", "--write-threads", "2", "--out-shard-size", "500M", "--lazy-unpickle", "--quiet")


def recipe(method: str, base: Path, models: Sequence[Path]) -> str:
    """Return the YAML of a merge in bf16: task_arithmetic with weights 0.3, or linear with equal weights."""
    weight = "0.3" if method == "task_arithmetic" else "1.0"
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method == "task_arithmetic":
        lines.append(f"base_model: {base}")
    lines.append("models:")
    for model in models:
        lines += [f"  - model: {model}", "    parameters:", f"      weight: {weight}"]
    return "\n".join(lines) + "\n"


def command(program: str, recipe_file: Path, out: Path, *, is_fast: bool = True) -> list[str]:
    """Return the command; ``program`` is mergekit-yaml, by name or path; without ``is_fast`` its default options."""
    return [program, str(recipe_file), str(out), *(FAST_OPTIONS if is_fast else ())]
