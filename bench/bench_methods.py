"""Every merge method from files to files, process start included, beside mergekit on the same recipe.

    python bench/bench_methods.py [--method ties --method sce] [--mergekit PROGRAM] [--family-folder DIR]

mergekit runs at its default options and at its fastest, in turns with ours. Methods for which it takes minutes run once
there; all of them take it an hour or more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from bench_merge import scratch_folder
from benchlib import mergekit
from benchlib.method_recipes import METHOD_RECIPES
from benchlib.page_cache import CacheState
from benchlib.processes import ProcessError, Usage
from benchlib.rounds import Measured, Task, run_rounds, usage_metrics
from benchlib.rows import Row, Spread, save_or_print
from make_family import FAMILIES, BenchFamily, default_folder, get_family

from metagpt_fast.family import family_nbytes
from metagpt_fast.page_cache import evict

DEFAULT_ROUNDS = 5
_MERGEKIT_ROUNDS = 2
# How mergekit is run: what its rows are called, and the metric of ours that compares with it.
MERGEKIT_RUNS = {"default": "mergekit", "fast": "mergekit, fast options"}
_SPEEDUPS = {"default": "speedup_mergekit", "fast": "speedup_mergekit_fast"}


class MethodBench:
    """Measures methods on one family.

    Args:
        family: what is merged.
        scratch: folder for recipes and outputs, on the family's file system.
        dtype: of the recipes; bfloat16 is the faster one for mergekit.
        tell: is given a line per measurement.
    """

    def __init__(self, family: BenchFamily, scratch: Path, dtype: str, tell: Callable[[str], None]) -> None:
        self._family = family
        self._scratch = scratch
        self._dtype = dtype
        self._tell = tell
        self._cache = CacheState(family.weights)
        evict(family.weights)  # read in order before the first round: see bench_merge

    def measure(self, method: str, num_rounds: int, program: str | None, runs: Sequence[str]) -> list[Row]:
        """Measure one method: ours, and mergekit at each of ``runs``, if there is a program."""
        setting = METHOD_RECIPES[method]
        recipe = self._scratch / f"{method}.yaml"
        recipe.write_text(setting.text(method, self._family, self._dtype), encoding="utf-8")
        tasks = [Task(method, lambda out: [*_OURS, str(recipe), str(out), "--quiet", "--no-sync"])]
        for run in runs if program is not None else ():
            tasks.append(
                Task(
                    f"{MERGEKIT_RUNS[run]}: {method}",
                    lambda out, run=run: mergekit.command(program, recipe, out, is_fast=run == "fast"),  # type: ignore[misc]
                    max_rounds=1 if setting.is_slow else _MERGEKIT_ROUNDS,
                )
            )
        self._cache.percents.clear()
        measured = run_rounds(tasks, num_rounds, self._scratch, before_round=self._cache.warm_up, tell=self._tell)
        return [self._our_row(method, measured), *(self._row(task.name, method, measured) for task in tasks[1:])]

    def _our_row(self, method: str, measured: Measured) -> Row:
        row = self._row(method, method, measured)
        ours = _usages(measured, method)
        for run, name in MERGEKIT_RUNS.items():
            theirs = _usages(measured, f"{name}: {method}")
            if theirs:
                row.metrics[_SPEEDUPS[run]] = Spread.of(speedups(ours, theirs))
        return row

    def _row(self, name: str, method: str, measured: Measured) -> Row:
        parameters = {
            "method": method,
            "dtype": self._dtype,
            "num_models": METHOD_RECIPES[method].num_models,
            "num_parameters": self._family.num_parameters,
            "model_nbytes": self._family.model_nbytes,
            "cache": "warm",
        }
        metrics = usage_metrics(_usages(measured, name))
        metrics["percent_cached"] = Spread.of(self._cache.percents)
        is_warm = self._cache.is_warm
        notes = () if is_warm else ("the inputs do not fit the page cache: this is no warm figure",)
        return Row("methods", name, parameters, metrics, notes=notes)


_OURS = (sys.executable, "-m", "metagpt_fast", "run")


def speedups(ours: Sequence[Usage], theirs: Sequence[Usage]) -> list[float]:
    """Return their wall time by ours for each of our runs: in the same round, or by their last where they ran less."""
    return [theirs[min(i, len(theirs) - 1)].seconds / usage.seconds for i, usage in enumerate(ours)]


def _usages(measured: Measured, name: str) -> list[Usage]:
    return [usage for usage in measured.get(name, ()) if usage is not None]


def collect(
    *,
    family_folder: Path | None = None,
    methods: Sequence[str] = (),
    num_rounds: int = DEFAULT_ROUNDS,
    mergekit_program: str | None = None,
    runs: Sequence[str] = tuple(MERGEKIT_RUNS),
    dtype: str = "bfloat16",
    scale: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure and return the rows; a method that fails is told of, and does not take the others' rows with it.

    Raises:
        ProcessError: every method failed.
    """
    # One output at a time; mergekit writes that of arcee_fusion in float32.
    out_nbytes = int(2.2 * family_nbytes(FAMILIES[scale].shape, 0))
    family = get_family(family_folder or default_folder(scale), scale=scale, free_after_nbytes=out_nbytes)
    rows: list[Row] = []
    failures: list[str] = []
    with scratch_folder(family) as scratch:
        bench = MethodBench(family, scratch, dtype, tell)
        for method in methods or METHOD_RECIPES:
            try:
                rows += bench.measure(method, num_rounds, mergekit_program, runs)
            except ProcessError as error:
                failures.append(f"{method}: {error}")
                tell(failures[-1])
    if not rows:
        raise ProcessError("\n".join(failures))
    return rows


@click.command()
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHOD_RECIPES)), help="Only these.")
@click.option(
    "--family-folder", type=click.Path(path_type=Path), help="Folder with base, chat, math, code; made if new."
)
@click.option("--rounds", "num_rounds", default=DEFAULT_ROUNDS, show_default=True, help="Runs of ours.")
@click.option(
    "--mergekit", "mergekit_program", is_flag=False, flag_value="mergekit-yaml", help="Also mergekit's command."
)
@click.option(
    "--options",
    "runs",
    multiple=True,
    type=click.Choice(list(MERGEKIT_RUNS)),
    default=tuple(MERGEKIT_RUNS),
    help="mergekit's options: default, fast, or both [both].",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="dtype of the recipes; mergekit computes in it.",
)
@click.option("--rows", "rows_file", type=click.Path(path_type=Path), help="Write the rows as JSON, for run.py.")
def main(rows_file: Path | None, **settings: object) -> None:
    """Measure merge methods, end to end."""
    try:
        rows = collect(tell=lambda line: click.echo(line, err=True), **settings)  # type: ignore[arg-type]
    except ProcessError as error:
        raise click.ClickException(str(error)) from error
    save_or_print(rows, rows_file)


if __name__ == "__main__":
    main()
