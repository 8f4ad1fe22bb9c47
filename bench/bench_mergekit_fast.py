"""mergekit-yaml-fast beside mergekit-yaml at its fastest options, on the same recipe, in turns.

    python bench/bench_mergekit_fast.py [--method linear --method ties] [--family-folder DIR] [--rounds 5]

The whole process, imports and planning included, which are mergekit's in both; and from the end of mergekit's planning
to the end of the command. Methods for which mergekit takes minutes run once there; all of them take an hour or more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import mergekit_phases
from bench_merge import scratch_folder
from bench_methods import speedups
from benchlib import mergekit
from benchlib.method_recipes import METHOD_RECIPES
from benchlib.page_cache import CacheState
from benchlib.processes import ProcessError, Usage
from benchlib.rounds import Task, run_rounds, usage_metrics
from benchlib.rows import Row, Spread, save_or_print
from make_family import FAMILIES, BenchFamily, default_folder, get_family

from metagpt_fast.family import family_nbytes
from metagpt_fast.page_cache import evict

DEFAULT_ROUNDS = 3
_THEIR_ROUNDS = 2


class Side:
    """One of the two commands: how it is run, and what it has told about its phases."""

    def __init__(self, whose: str, scratch: Path, options: Sequence[str]) -> None:
        self.whose = whose
        self._options = options
        self._phases = scratch / f"{whose}.jsonl"

    def command(self, recipe: Path, out: Path) -> list[str]:
        """Return the command, with the clock behind the planning."""
        program = [sys.executable, mergekit_phases.__file__, self.whose, str(self._phases)]
        return [*program, str(recipe), str(out), "--no-copy-tokenizer", *self._options]

    def take_phases(self) -> list[dict[str, float]]:
        """Return a line per run since the last call."""
        lines = self._phases.read_text(encoding="utf-8").splitlines()
        self._phases.unlink()
        return [json.loads(line) for line in lines]


def measure(
    method: str, family: BenchFamily, scratch: Path, num_rounds: int, dtype: str, tell: Callable[[str], None]
) -> list[Row]:
    """Measure one method with both commands; the first row is ours."""
    setting = METHOD_RECIPES[method]
    recipe = scratch / f"{method}.yml"
    recipe.write_text(setting.text(method, family, dtype), encoding="utf-8")
    ours = Side("ours", scratch, ("--quiet", "--no-sync"))  # mergekit waits for no disk either
    theirs = Side("theirs", scratch, mergekit.FAST_OPTIONS)
    names = {ours: f"mergekit-yaml-fast: {method}", theirs: f"mergekit, fast options: {method}"}
    tasks = [
        Task(names[ours], lambda out: ours.command(recipe, out)),
        Task(
            names[theirs], lambda out: theirs.command(recipe, out), max_rounds=1 if setting.is_slow else _THEIR_ROUNDS
        ),
    ]
    cache = CacheState(family.weights)
    measured = run_rounds(tasks, num_rounds, scratch, before_round=cache.warm_up, tell=tell)
    rows, phases, usages = [], {}, {}
    for side, name in names.items():
        usages[side] = [usage for usage in measured[name] if usage is not None]
        phases[side] = side.take_phases()
        rows.append(Row("mergekit", name, _parameters(method, dtype, family), _metrics(usages[side], phases[side])))
        rows[-1].metrics["percent_cached"] = Spread.of(cache.percents)
    rows[0].metrics["speedup_mergekit_fast"] = Spread.of(speedups(usages[ours], usages[theirs]))
    rows[0].metrics["speedup_after_planning"] = Spread.of(
        [
            phases[theirs][min(i, len(phases[theirs]) - 1)]["seconds"] / phase["seconds"]
            for i, phase in enumerate(phases[ours])
        ]
    )
    return rows


def _parameters(method: str, dtype: str, family: BenchFamily) -> dict[str, object]:
    return {
        "method": method,
        "dtype": dtype,
        "num_models": METHOD_RECIPES[method].num_models,
        "num_parameters": family.num_parameters,
        "model_nbytes": family.model_nbytes,
        "cache": "warm",
    }


def _metrics(usages: Sequence[Usage], phases: Sequence[dict[str, float]]) -> dict[str, Spread]:
    metrics = usage_metrics(usages)
    metrics["seconds_after_planning"] = Spread.of([phase["seconds"] for phase in phases])
    peaks = [
        (usage.peak_anonymous_nbytes - phase["anonymous_nbytes"]) / 1e6
        for usage, phase in zip(usages, phases, strict=True)
        if usage.peak_anonymous_nbytes is not None
    ]
    if peaks:
        metrics["peak_above_imports_mb"] = Spread.of(peaks)
    return metrics


def collect(
    *,
    family_folder: Path | None = None,
    methods: Sequence[str] = (),
    num_rounds: int = DEFAULT_ROUNDS,
    dtype: str = "bfloat16",
    scale: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure and return the rows, two per method."""
    # One output at a time; mergekit writes that of arcee_fusion in float32.
    out_nbytes = int(2.2 * family_nbytes(FAMILIES[scale].shape, 0))
    family = get_family(family_folder or default_folder(scale), scale=scale, free_after_nbytes=out_nbytes)
    with scratch_folder(family) as scratch:
        evict(family.weights)  # read in order before the first round: see bench_merge
        return [
            row
            for method in methods or METHOD_RECIPES
            for row in measure(method, family, scratch, num_rounds, dtype, tell)
        ]


@click.command()
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHOD_RECIPES)), help="Only these.")
@click.option(
    "--family-folder", type=click.Path(path_type=Path), help="Folder with base, chat, math, code; made if new."
)
@click.option("--rounds", "num_rounds", default=DEFAULT_ROUNDS, show_default=True, help="Runs of ours.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--rows", "rows_file", type=click.Path(path_type=Path), help="Write the rows as JSON, for run.py.")
def main(rows_file: Path | None, **settings: object) -> None:
    """Measure mergekit-yaml-fast and mergekit-yaml, end to end."""
    try:
        rows = collect(tell=lambda line: click.echo(line, err=True), **settings)  # type: ignore[arg-type]
    except ProcessError as error:
        raise click.ClickException(str(error)) from error
    save_or_print(rows, rows_file)


if __name__ == "__main__":
    main()
