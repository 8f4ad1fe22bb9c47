"""Merges from files to files, process start included, against copying the files.

The reference is what copying takes: ``cat`` of every input byte, as often as the merge has to read it (twice for
granularity model, else once), plus ``cp`` of one model. Same round, same file system, same page cache.

    python bench/bench_merge.py [--family-folder DIR] [--cold] [--scale 4] [--mergekit]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import click
from benchlib import mergekit
from benchlib.machine import copy_command, is_memory_file_system
from benchlib.page_cache import CacheState
from benchlib.processes import ProcessError, Usage, clean_environment, run_measured
from benchlib.rounds import Measured, Task, run_rounds, usage_metrics
from benchlib.rows import Row, Spread, save_or_print
from make_family import FAMILIES, BenchFamily, default_folder, get_family

from metagpt_fast.family import family_nbytes
from metagpt_fast.page_cache import evict

_MAX_PERCENT_CACHED_WHEN_COLD = 1.0
_COLD_ROUNDS = 3
_BASELINE_ROUNDS = 3
DEFAULT_ROUNDS = 7
_DEFAULT_MEMORY = "1GiB"


@dataclass(frozen=True)
class Case:
    """A merge to measure.

    Attributes:
        name: of its row.
        task: the command.
        num_reads: how often every input byte has to be read.
        notes: for readers.
    """

    name: str
    task: Task
    num_reads: int
    notes: tuple[str, ...] = ()


class MergeBench:
    """Measures merges of one family.

    Args:
        family: what is merged.
        scratch: folder for outputs, on the family's file system.
        memory: ``--memory`` of our merges.
        tell: is given a line per measurement.
    """

    def __init__(self, family: BenchFamily, scratch: Path, memory: str, tell: Callable[[str], None]) -> None:
        self._family = family
        self._scratch = scratch
        self._memory = memory
        self._tell = tell
        self._cache = CacheState(family.weights)

    def ours(self, name: str, num_reads: int, *arguments: str, is_on_disk: bool = False) -> Case:
        """Return a merge by this project; the name is also its row's. As `cp`, it does not wait for the disk."""

        def command(out: Path) -> list[str]:
            words = [sys.executable, "-m", "metagpt_fast", "merge", *self._inputs(), "-o", str(out)]
            return [*words, "--quiet", "--memory", self._memory, *arguments, *(() if is_on_disk else ("--no-sync",))]

        return Case(name, Task(name, command), num_reads)

    def standard_cases(self) -> list[Case]:
        """Return the merges that the README reports, after measuring for the one that needs it."""
        measurement = self._scratch / "measured.json"
        words = [sys.executable, "-m", "metagpt_fast", "measure", *self._inputs(), "--quiet", "-o", str(measurement)]
        run_measured(words, folder=self._scratch, environment=clean_environment())
        return [
            self.ours("metagpt, model", 2),
            self.ours("metagpt, layer", 1, "--granularity", "layer"),
            self.ours("metagpt, tensor", 1, "--granularity", "tensor"),
            self.ours("metagpt, model, on the disk", 2, is_on_disk=True),
            self.ours("metagpt, layer, on the disk", 1, "--granularity", "layer", is_on_disk=True),
            self.ours("metagpt, model, measured before", 1, "--measurement", str(measurement)),
            self.ours("task_arithmetic", 1, "--method", "task_arithmetic", "--coefficients", "0.3,0.3,0.3"),
        ]

    def torch_cases(self) -> list[Case]:
        """Return plain torch doing task arithmetic, if it is installed."""
        if find_spec("torch") is None:
            return []
        name = "plain torch: task_arithmetic"
        script = str(Path(__file__).with_name("baselines.py"))

        def command(out: Path) -> list[str]:
            return [sys.executable, script, *self._inputs(), "-o", str(out), "--coefficient", "0.3"]

        return [Case(name, Task(name, command, max_rounds=_BASELINE_ROUNDS), 1)]

    def mergekit_cases(self, program: str) -> list[Case]:
        """Return mergekit with its fastest options, and our linear, which the others lack."""
        ours = self.ours("linear", 1, "--method", "linear")
        cases = [replace(ours, notes=("does not read the base, which the bytes and the reference count",))]
        for method in ("task_arithmetic", "linear"):
            recipe = self._scratch / f"mergekit-{method}.yml"
            recipe.write_text(mergekit.recipe(method, self._family.base, self._family.models), encoding="utf-8")
            task = Task(
                f"mergekit: {method}",
                lambda out, recipe=recipe: mergekit.command(program, recipe, out),  # type: ignore[misc]
                max_rounds=2,
            )
            cases.append(Case(task.name, task, 1))
        return cases

    def warm(self, cases: Sequence[Case], num_rounds: int) -> list[Row]:
        """Measure with the inputs in the page cache."""
        tasks = [
            Task("cat", self._cat),
            *(case.task for case in cases[:1]),
            Task("cp", self._cp),
            *(case.task for case in cases[1:2]),
            Task("cat again", self._cat),
            *(case.task for case in cases[2:]),
        ]
        self._cache.percents.clear()
        # One known state of the page cache, that of files read in order. Who filled it decides the size of its folios,
        # and with it the speed of mapped reads: after page-by-page reading ahead, a merge took up to 1 s more CPU time.
        evict(self._family.weights)
        measured = run_rounds(tasks, num_rounds, self._scratch, before_round=self._cache.warm_up, tell=self._tell)
        notes: tuple[str, ...] = ()
        if not self._cache.is_warm:
            notes = ("the inputs do not fit the page cache: this is no warm figure",)
        return self._rows(cases, measured, ("cat", "cat again"), "warm", notes)

    def cold(self, cases: Sequence[Case], num_rounds: int) -> list[Row]:
        """Measure with none of the inputs in the page cache; the second read of two may find them there."""
        tasks = [
            Task("cold cat", self._cat, prepare=self._cache.cool_down),
            Task("cat", self._cat),
            Task("cp", self._cp),
        ]
        tasks += [Task(case.name, case.task.command, prepare=self._cache.cool_down) for case in cases]
        self._cache.percents.clear()
        measured = run_rounds(tasks, num_rounds, self._scratch, rotates=False, tell=self._tell)
        cached = max(self._cache.percents)
        if cached > _MAX_PERCENT_CACHED_WHEN_COLD:
            self._tell(f"no cold figures: {cached:.1f} % of the inputs stayed in the page cache after all was evicted")
            return []
        return self._rows(cases, measured, ("cold cat", "cat"), "cold", ())

    def once(self, case: Case, name: str) -> Row:
        """Measure one merge alone, for its memory."""
        measured = run_rounds([case.task], 1, self._scratch, tell=self._tell)
        usages = [usage for usage in measured[case.task.name] if usage is not None]
        return self._row(case, usages, {}, name, ("measured once, for its memory",))

    def _rows(
        self, cases: Sequence[Case], measured: Measured, reads: tuple[str, str], cache: str, notes: tuple[str, ...]
    ) -> list[Row]:
        rows = []
        references = {n: self._reference_seconds(measured, reads, n, is_cold=cache == "cold") for n in (1, 2)}
        for num_reads, seconds in references.items():
            nbytes = num_reads * self._family.input_nbytes + self._family.model_nbytes
            metrics = {
                "seconds": Spread.of(seconds),
                "gb_per_s": Spread.of([nbytes / s / 1e9 for s in seconds]),
                "percent_cached": Spread.of(self._cache.percents),
            }
            what = f"cat of all inputs {'once' if num_reads == 1 else 'twice'}, cp of one model"
            parameters = {"cache": cache, "num_reads": num_reads, **self._sizes()}
            name = f"reference, {num_reads} read{'s'[: num_reads - 1]}, {cache}"
            rows.append(Row("merge", name, parameters, metrics, self._formula(num_reads), nbytes, (what, *notes)))
        for case in cases:
            usages = [usage for usage in measured[case.task.name] if usage is not None]
            ratios = [
                usage.seconds / reference
                for usage, reference in zip(measured[case.task.name], references[case.num_reads], strict=True)
                if usage is not None
            ]
            rows.append(
                self._row(case, usages, {"ratio_to_reference": Spread.of(ratios)}, f"{case.name}, {cache}", notes)
            )
        return rows

    def _row(
        self, case: Case, usages: Sequence[Usage], metrics: dict[str, Spread], name: str, notes: tuple[str, ...]
    ) -> Row:
        nbytes = case.num_reads * self._family.input_nbytes + self._family.model_nbytes
        metrics = {
            **usage_metrics(usages),
            **metrics,
            "gb_per_s": Spread.of([nbytes / usage.seconds / 1e9 for usage in usages]),
        }
        parameters = {"case": case.name, "cache": name.rsplit(", ", maxsplit=1)[-1], "num_reads": case.num_reads}
        parameters |= {"memory": self._memory, **self._sizes()}
        return Row("merge", name, parameters, metrics, self._formula(case.num_reads), nbytes, (*case.notes, *notes))

    def _reference_seconds(
        self, measured: Measured, reads: tuple[str, str], num_reads: int, *, is_cold: bool
    ) -> list[float]:
        """Return per round what copying takes: one read is the mean of both, or the cold one."""
        seconds = []
        for first, second, copy in zip(measured[reads[0]], measured[reads[1]], measured["cp"], strict=True):
            assert first is not None and second is not None and copy is not None  # these have no max_rounds
            both = first.seconds + second.seconds
            once = first.seconds if is_cold else both / 2
            seconds.append((both if num_reads == 2 else once) + copy.seconds)
        return seconds

    def _inputs(self) -> list[str]:
        return [str(self._family.base), *map(str, self._family.models)]

    def _cat(self, out: Path) -> list[str]:
        del out
        return ["cat", *map(str, self._family.weights)]

    def _cp(self, out: Path) -> list[str]:
        return copy_command(self._family.base, out)

    def _sizes(self) -> dict[str, object]:
        return {
            "num_parameters": self._family.num_parameters,
            "model_nbytes": self._family.model_nbytes,
            "num_models": len(self._family.models),
        }

    def _formula(self, num_reads: int) -> str:
        return f"{num_reads}·(base + models) read + 1 model written"


@contextmanager
def scratch_folder(family: BenchFamily) -> Iterator[Path]:
    """Make a folder beside the family, on the same file system, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="metagpt-fast-bench-", dir=family.base.parent.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect(
    *,
    family_folder: Path | None = None,
    scale: int = 1,
    num_rounds: int = DEFAULT_ROUNDS,
    is_quick: bool = False,
    is_cold: bool = False,
    mergekit_program: str | None = None,
    memory: str = _DEFAULT_MEMORY,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure and return the rows.

    With another scale than 1, it is the memory of one merge only, and the family is removed if it was not there before:
    it takes tens of gigabytes.
    """
    out_nbytes = int(1.1 * family_nbytes(FAMILIES[scale].shape, 0))
    folder = family_folder or default_folder(scale)
    is_temporary = scale != 1 and not folder.exists()
    try:
        family = get_family(folder, scale=scale, free_after_nbytes=out_nbytes)
        return _collect(family, scale, num_rounds, is_quick, is_cold, mergekit_program, memory, tell)
    finally:
        if is_temporary:
            shutil.rmtree(folder, ignore_errors=True)


def _collect(
    family: BenchFamily,
    scale: int,
    num_rounds: int,
    is_quick: bool,
    is_cold: bool,
    mergekit_program: str | None,
    memory: str,
    tell: Callable[[str], None],
) -> list[Row]:
    with scratch_folder(family) as scratch:
        bench = MergeBench(family, scratch, memory, tell)
        if scale != 1:
            return [bench.once(bench.ours("metagpt, model", 2), f"metagpt, model, scale {scale}")]
        cases = bench.standard_cases()
        if is_quick:
            cases = cases[:2]
        else:
            cases += bench.torch_cases()
        if mergekit_program is not None:
            cases += bench.mergekit_cases(mergekit_program)
        rows = bench.warm(cases, num_rounds)
        if is_cold and is_memory_file_system(family.base):
            tell("no cold figures: the family is on a file system that lives in memory")
        elif is_cold:
            rows += bench.cold(cases[:2], _COLD_ROUNDS)
    return rows


@click.command()
@click.option(
    "--family-folder", type=click.Path(path_type=Path), help="Folder with base, chat, math, code; made if new."
)
@click.option("--scale", type=click.Choice([str(scale) for scale in FAMILIES]), default="1", show_default=True)
@click.option("--rounds", "num_rounds", default=DEFAULT_ROUNDS, show_default=True)
@click.option("--memory", default=_DEFAULT_MEMORY, show_default=True, help="--memory of our merges.")
@click.option("--quick", "is_quick", is_flag=True, help="Granularity model and layer only, no baselines.")
@click.option("--cold", "is_cold", is_flag=True, help="Also with the inputs evicted from the page cache.")
@click.option(
    "--mergekit", "mergekit_program", is_flag=False, flag_value="mergekit-yaml", help="Also mergekit's command."
)
@click.option("--rows", "rows_file", type=click.Path(path_type=Path), help="Write the rows as JSON, for run.py.")
def main(scale: str, rows_file: Path | None, **settings: object) -> None:
    """Measure merges of a family of checkpoints, end to end."""
    try:
        rows = collect(scale=int(scale), tell=lambda line: click.echo(line, err=True), **settings)  # type: ignore[arg-type]
    except ProcessError as error:
        raise click.ClickException(str(error)) from error
    save_or_print(rows, rows_file)


if __name__ == "__main__":
    main()
