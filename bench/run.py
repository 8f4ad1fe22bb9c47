"""Runs the benchmarks, writes one JSON, prints the tables.

python bench/run.py                     everything for the README, 10 to 15 minutes, 9 GB of disk, 45 GB for a while
python bench/run.py --quick             the main figures, under 4 minutes
python bench/run.py --join A.json ...   joins files that the parts wrote with --rows, measures nothing
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_merge
import bench_methods
import bench_startup
import click
from benchlib.machine import commit, describe_machine, describe_versions, result_name
from benchlib.processes import ProcessError, clean_environment
from benchlib.rows import Result, Row, load_rows
from benchlib.show import print_rows
from make_family import default_folder

BENCH = Path(__file__).resolve().parent
_QUICK_ROUNDS = 3


def measure_kernels(*, is_quick: bool, is_grid: bool) -> list[Row]:
    """Run bench_kernels and return its rows."""
    options = ["--grid"] if is_grid else []
    return _run_pytest("bench_kernels", [*options, *(["--turns", "2", "--baseline-rounds", "1"] if is_quick else [])])


def measure_io(*, is_quick: bool, folder: Path) -> list[Row]:
    """Run bench_io in a folder of the merges' file system, and return its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    return _run_pytest("bench_io", ["--io-folder", str(folder), *(["--io-rounds", "3"] if is_quick else [])])


def _run_pytest(name: str, options: Sequence[str]) -> list[Row]:
    """Run a file under pytest-benchmark and return its rows."""
    # In an empty folder: `python -m pytest` imports from where it runs, and that must not be the source tree.
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", str(BENCH / f"{name}.py"), "-p", "no:cacheprovider"]
        command += ["-p", "no:randomly", "--rows", str(rows_file), *options]
        done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ProcessError(f"{name} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return load_rows(rows_file)


def measure_all(
    *,
    is_quick: bool,
    is_grid: bool,
    family_folder: Path | None,
    mergekit_program: str | None,
    tell: Callable[[str], None],
) -> tuple[list[Row], list[str]]:
    """Run every part; one that fails does not take the others' figures with it.

    Returns:
        The rows, and what went wrong, one text per part that failed.
    """
    parts: dict[str, Callable[[], list[Row]]] = {
        "startup": bench_startup.collect,
        "kernels": lambda: measure_kernels(is_quick=is_quick, is_grid=is_grid),
        "io": lambda: measure_io(is_quick=is_quick, folder=(family_folder or default_folder(1)).resolve().parent),
        "merge": lambda: bench_merge.collect(
            family_folder=family_folder,
            num_rounds=_QUICK_ROUNDS if is_quick else bench_merge.DEFAULT_ROUNDS,
            is_quick=is_quick,
            is_cold=not is_quick,
            mergekit_program=mergekit_program,
            tell=tell,
        ),
    }
    if not is_quick:
        # mergekit takes its hour in bench_methods.py --mergekit, whose rows can be joined to these.
        parts["methods"] = lambda: bench_methods.collect(family_folder=family_folder, num_rounds=3, tell=tell)
        # Last: its files push everything else out of the page cache.
        folder = (family_folder or default_folder(1)).with_name("llama-scale4")
        parts["merge, scale 4"] = lambda: bench_merge.collect(family_folder=folder, scale=4, tell=tell)
    rows: list[Row] = []
    failures = []
    for name, collect in parts.items():
        started = time.perf_counter()
        tell(f"{name} ...")
        try:
            rows += collect()
        except (ProcessError, click.ClickException, OSError) as error:
            failures.append(f"{name}: {error.format_message() if isinstance(error, click.ClickException) else error}")
            tell(failures[-1])
        tell(f"{name}: {time.perf_counter() - started:.0f} s")
    return rows, failures


def make_result(rows: Sequence[Row], folder: Path, settings: dict[str, object]) -> Result:
    """Return the rows with what they were measured on; ``folder`` is on the merges' file system."""
    return Result(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        commit=commit(),
        machine=describe_machine(folder),
        versions=describe_versions(),
        settings=settings,
        rows=tuple(rows),
    )


@click.command()
@click.option("--quick", "is_quick", is_flag=True, help="Few rounds; no baselines, no cold cache, no large family.")
@click.option("--grid", "is_grid", is_flag=True, help="Kernels: every dtype, T and ISA. Half an hour more.")
@click.option(
    "--family-folder", type=click.Path(path_type=Path), help="Folder with base, chat, math, code; made if new."
)
@click.option(
    "--mergekit", "mergekit_program", is_flag=False, flag_value="mergekit-yaml", help="Also mergekit's command."
)
@click.option("--join", "joined", multiple=True, type=click.Path(path_type=Path, exists=True), help="Measure nothing.")
@click.option("-o", "out", type=click.Path(path_type=Path), help="The JSON [bench/results/, named by the machine].")
def main(
    is_quick: bool,
    is_grid: bool,
    family_folder: Path | None,
    mergekit_program: str | None,
    joined: tuple[Path, ...],
    out: Path | None,
) -> None:
    """Measure, write the JSON, print the tables."""
    failures: list[str] = []
    if joined:
        rows = [row for path in joined for row in load_rows(path)]
    else:
        rows, failures = measure_all(
            is_quick=is_quick,
            is_grid=is_grid,
            family_folder=family_folder,
            mergekit_program=mergekit_program,
            tell=lambda line: click.echo(line, err=True),
        )
    folder = (family_folder or default_folder(1)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = make_result(rows, folder.parent, {"quick": is_quick, "grid": is_grid})
    path = out or BENCH / "results" / result_name(result.machine)
    result.save(path)
    print_rows(result.rows)
    click.echo(f"written: {path}")
    if failures:
        raise click.ClickException("not measured: " + "; ".join(failures))


if __name__ == "__main__":
    main()
