"""How time and memory of merges grow: with parameters, models, tensors, shards; and the plans of 70 B and 405 B models.

    python bench/bench_scale.py [--folder DIR] [--disk 8GB] [--sweep NAME ...] [--rounds 5] [--rows FILE]

Each sweep changes one thing and leaves the others. A family is made, merged in rounds (granularity model, granularity
layer, dry run, in turns; inputs in the page cache) and removed before the next one is made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from benchlib.fits import SWEEPS
from benchlib.machine import free_nbytes
from benchlib.page_cache import CacheState, evict
from benchlib.processes import ProcessError, clean_environment
from benchlib.rounds import Task, run_rounds, usage_metrics
from benchlib.rows import Row, Spread, save_or_print
from benchlib.shapes import REAL_LLAMAS, TensorGrid, llama_of_width, num_parameters, write_sparse_model

from metagpt_fast.dtypes import BF16
from metagpt_fast.errors import MetagptFastError
from metagpt_fast.family import BASE_NAME, ModelShape, make_family
from metagpt_fast.quantities import parse_nbytes

DEFAULT_ROUNDS = 5
DEFAULT_DISK = "8GB"
LLAMA_SWEEP = "llama"
_SEED = 20240618
_SHARD_NBYTES = 5_000_000_000  # the command's default
_NUM_MODELS = 3
_MAX_NUM_MODELS = 16
_WIDTHS = (640, 896, 1408, 1920, 2816, 4096, 5632, 8192)  # 0.11 B, then about twice as many each time
_COUNTED_TENSORS = {10: (2048, 2500), 100: (512, 1000), 1000: (64, 800), 10_000: (64, 80), 50_000: (32, 32)}
_SHARDED = TensorGrid(1024, 64, 1600)
_SHARD_COUNTS = (1, 4, 16, 64, 256)
_DISK_SIZE = "16t"
TASKS: dict[str, tuple[str, ...]] = {
    "merge, model": ("--granularity", "model", "--no-sync", "--quiet"),
    "merge, layer": ("--granularity", "layer", "--no-sync", "--quiet"),
    "dry run": ("--dry-run",),
}
_NUM_READS = {"merge, model": 2, "merge, layer": 1, "dry run": 0}


@dataclass(frozen=True)
class Point:
    """A family to make, and with how many of its models it is merged.

    Attributes:
        sweep: what changes from point to point.
        shape: of every model.
        counts: numbers of models that are merged; the family has the largest of them.
        max_shard_nbytes: of inputs and output.
    """

    sweep: str
    shape: ModelShape
    counts: tuple[int, ...] = (_NUM_MODELS,)
    max_shard_nbytes: int = _SHARD_NBYTES

    @property
    def nbytes(self) -> int:
        """Return the bytes of base, models and one output, headers left out."""
        return (2 + max(self.counts)) * 2 * num_parameters(self.shape)


def points_of(sweep: str, max_nbytes: int) -> list[Point]:
    """Return the points of a sweep whose files fit ``max_nbytes``."""
    if sweep == "parameters":
        points = [Point(sweep, llama_of_width(width)) for width in _WIDTHS]
    elif sweep == "models":
        counts = tuple(2**i for i in range(_MAX_NUM_MODELS.bit_length()))
        points = [Point(sweep, llama_of_width(_WIDTHS[0]), counts)]
    elif sweep == "tensors":
        points = [Point(sweep, TensorGrid(number, *size)) for number, size in _COUNTED_TENSORS.items()]
    else:
        points = [Point(sweep, _SHARDED, max_shard_nbytes=_sharded_nbytes(number)) for number in _SHARD_COUNTS]
    return [point for point in points if point.nbytes <= max_nbytes]


def _sharded_nbytes(num_shards: int) -> int:
    """Return the size of shards that cuts the grid into as many: its tensors, and room for their header."""
    num_tensors = _SHARDED.num_tensors // num_shards
    return num_tensors * (2 * _SHARDED.rows * _SHARDED.columns + 128) + 4096


def merge_command(
    base: Path, models: Sequence[Path], out: Path, max_shard_nbytes: int, words: Sequence[str]
) -> list[str]:
    """Return the command that is measured."""
    inputs = [str(path) for path in (base, *models)]
    command = [sys.executable, "-m", "metagpt_fast", "merge", *inputs, "-o", str(out)]
    return [*command, "--max-shard-size", str(max_shard_nbytes), *words]


def measure_point(point: Point, folder: Path, num_rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Make the family in the folder, which exists and is empty, and measure every task for every number of models."""
    names = [f"model-{i:02d}" for i in range(max(point.counts))]
    family = make_family(
        folder / "family",
        shape=point.shape,
        names=names,
        task_vector_sigmas=[1e-3 * 0.9**i for i in range(len(names))],
        max_shard_nbytes=point.max_shard_nbytes,
        seed=_SEED,
    )
    weights = sorted((folder / "family").glob("*/*.safetensors"))
    cache = CacheState(weights)
    evict(weights)  # one known state of the page cache, that of files read in order
    tasks, rows = {}, []
    for count in point.counts:
        for task, words in TASKS.items():

            def command(out: Path, count: int = count, words: Sequence[str] = words) -> list[str]:
                return merge_command(family.base, family.models[:count], out, point.max_shard_nbytes, words)

            tasks[task, count] = Task(f"{point.sweep}, {count} models: {task}", command)
    measured = run_rounds(list(tasks.values()), num_rounds, folder, before_round=cache.warm_up, tell=tell)
    notes = () if cache.is_warm else ("the inputs do not fit the page cache: this is no warm figure",)
    for (task, count), done in tasks.items():
        usages = [usage for usage in measured[done.name] if usage is not None]
        facts: dict[str, object] = {"sweep": point.sweep, "task": task, "num_parameters": family.num_parameters}
        facts |= {"num_models": count, "num_tensors": len(point.shape.tensors(BF16)), "num_shards": family.num_shards}
        num_reads = _NUM_READS[task]
        nbytes = 2 * family.num_parameters * (num_reads * (1 + count) + 1) if num_reads else 0
        metrics = usage_metrics(usages)
        if nbytes:
            metrics["gb_per_s"] = Spread.of([nbytes / usage.seconds / 1e9 for usage in usages])
        formula = f"{num_reads}·(base + models) read + 1 model written" if nbytes else ""
        rows.append(Row("scale", f"{_label(facts)}: {task}", facts, metrics, formula, nbytes, notes))
    return rows


def _label(facts: Mapping[str, Any]) -> str:
    """Return what a point is called: its place in its sweep."""
    name, unit, words = SWEEPS[facts["sweep"]]
    value = facts[name] / unit
    return f"{facts['sweep']}, {value:.2f} {words}" if unit > 1 else f"{facts['sweep']}, {value:.0f}"


def measure_llama(name: str, folder: Path, num_rounds: int, tell: Callable[[str], None]) -> Row:
    """Plan the merge of a base and three models with the shapes of a real one; the files hold headers and holes."""
    shape = REAL_LLAMAS[name]
    paths = [folder / label for label in (BASE_NAME, "chat", "math", "code")]
    for path in paths:
        num_shards = write_sparse_model(path, shape, _SHARD_NBYTES)
    nbytes = 2 * num_parameters(shape)
    has_space = free_nbytes(folder) > 1.01 * nbytes
    notes = ("sparse files",)
    if not has_space:
        notes += (f"the output's disk: an empty tmpfs that says it has {_DISK_SIZE}, mounted by the measured command",)

    def command(out: Path) -> list[str]:
        if has_space:
            return merge_command(paths[0], paths[1:], out, _SHARD_NBYTES, ("--dry-run", "--json"))
        disk = folder / "disk"
        disk.mkdir(exist_ok=True)
        words = merge_command(paths[0], paths[1:], disk / "out", _SHARD_NBYTES, ("--dry-run", "--json"))
        script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", _DISK_SIZE, str(disk), *words]

    out = folder / "out"
    done = subprocess.run(command(out), capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        raise ProcessError(f"the plan of {name} failed: {done.stderr.strip()[-4000:]}")
    plan = json.loads(done.stdout)
    task = Task(f"{LLAMA_SWEEP} {name}: dry run", command)
    usages = [usage for usage in run_rounds([task], num_rounds, folder, tell=tell)[task.name] if usage is not None]
    facts = {"sweep": LLAMA_SWEEP, "task": "dry run", "num_models": len(paths) - 1, "num_shards": num_shards}
    facts |= {fact: plan[fact] for fact in ("num_parameters", "num_tensors", "nbytes_measured", "nbytes_combined")}
    facts |= {"nbytes_written": sum(shard["nbytes"] for shard in plan["shards"])}
    return Row("scale", task.name, facts, usage_metrics(usages), notes=notes)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for one point, and remove it at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="metagpt-fast-scale-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect(
    *,
    folder: Path | None = None,
    sweeps: Sequence[str] = (),
    max_nbytes: int,
    num_rounds: int = DEFAULT_ROUNDS,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure and return the rows.

    Args:
        folder: where families are made, one at a time; default the system's temporary folder.
        sweeps: those to measure; default all.
        max_nbytes: the most that the files of a point may take on the disk.
        num_rounds: how often each command runs.
        tell: is given a line per measurement.

    Raises:
        click.ClickException: the disk is too small.
        ProcessError: a merge failed.
    """
    parent = folder or Path(tempfile.gettempdir())
    chosen = sweeps or (*SWEEPS, LLAMA_SWEEP)
    rows = []
    for sweep in chosen:
        if sweep == LLAMA_SWEEP:
            for name in REAL_LLAMAS:
                with scratch_folder(parent) as scratch:
                    rows.append(measure_llama(name, scratch, num_rounds, tell))
            continue
        for point in points_of(sweep, max_nbytes):
            if free_nbytes(parent) < 1.05 * point.nbytes:
                raise click.ClickException(
                    f"{parent}: too little space: got {free_nbytes(parent) / 1e9:.1f} GB free, expected "
                    f"{1.05 * point.nbytes / 1e9:.1f} GB; choose another disk with --folder, or less with --disk"
                )
            with scratch_folder(parent) as scratch:
                rows += measure_point(point, scratch, num_rounds, tell)
    return rows


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where families are made [the temporary folder].")
@click.option("--disk", default=DEFAULT_DISK, show_default=True, help="The most that they may take at a time.")
@click.option("--sweep", "sweeps", multiple=True, type=click.Choice([*SWEEPS, LLAMA_SWEEP]), help="Default all.")
@click.option("--rounds", "num_rounds", default=DEFAULT_ROUNDS, show_default=True)
@click.option("--rows", "rows_file", type=click.Path(path_type=Path), help="Write the rows as JSON, for run.py.")
def main(folder: Path | None, disk: str, sweeps: tuple[str, ...], num_rounds: int, rows_file: Path | None) -> None:
    """Measure how time and memory of merges grow."""
    try:
        rows = collect(
            folder=folder,
            sweeps=sweeps,
            max_nbytes=parse_nbytes(disk, where="--disk"),
            num_rounds=num_rounds,
            tell=lambda line: click.echo(line, err=True),
        )
    except (ProcessError, MetagptFastError) as error:
        raise click.ClickException(str(error)) from error
    save_or_print(rows, rows_file)


if __name__ == "__main__":
    main()
