"""The merges that are compared, each by the command that makes it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK_ARITHMETIC = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
EXPONENTS = (3.0, 2.0, 1.0, -1.0)
GRANULARITIES = ("model", "layer", "tensor")


@dataclass(frozen=True)
class Merge:
    """A merge: a family of methods, a name within it, and the options of ``metagpt-fast merge``."""

    family: str
    name: str
    options: tuple[str, ...]


def merges() -> list[Merge]:
    """Return all merges that are compared."""
    made = [Merge("average", "average", ("--method", "linear"))]
    for scale in TASK_ARITHMETIC:
        options = ("--method", "task_arithmetic", "--coefficients", f"{scale}")
        made.append(Merge("task arithmetic", f"task arithmetic, λ = {scale}", options))
    for density in (0.2, 0.5):
        for scale in (0.5, 1.0):
            options = ("--method", "ties", "--set", f"density={density}", "--set", f"lambda={scale}")
            made.append(Merge("TIES", f"TIES, density {density}, λ = {scale}", options))
    for method, name in (("dare_linear", "DARE"), ("dare_ties", "DARE-TIES")):
        for density in (0.5, 0.9):
            for scale in ("0.3", "0.5"):
                options = ("--method", method, "--set", f"density={density}", "--coefficients", scale)
                made.append(Merge("DARE", f"{name}, density {density}, λ = {scale}", options))
    for granularity in GRANULARITIES:
        for exponent in EXPONENTS:
            options = ("--granularity", granularity, "--exponent", f"{exponent:g}")
            made.append(Merge("MetaGPT", f"MetaGPT, {granularity}, p = {exponent:g}", options))
    return made


def run_merge(base: Path, models: Sequence[Path], out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Merge with the real command; returns what it reports as JSON."""
    return _metagpt_fast("merge", str(base), *map(str, models), "-o", str(out), "--overwrite", *options)


def measure(base: Path, models: Sequence[Path], page: Path) -> dict[str, Any]:
    """Measure with the real command, and write its page."""
    return _metagpt_fast("measure", str(base), *map(str, models), "--html", str(page))


def _metagpt_fast(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "metagpt_fast", *arguments, "--json", "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result
