"""How long it takes until the command answers, and what it imports on the way.

python bench/bench_startup.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from benchlib.processes import ProcessError, clean_environment, run_measured
from benchlib.rows import Row, Spread, save_or_print

_RUNS = 15
_HEAVY = ("torch", "numpy", "rich", "transformers")

# Prints how long the import took, in the process itself: Python's own start is a row of its own.
_TIME_IMPORT = """
import time; started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
import sys; print(seconds, *({heavy!r} & sys.modules.keys()))
"""
_RUN_COMMAND = """
import sys
from metagpt_fast.cli import main
sys.argv = ["metagpt-fast", {argument!r}]
try:
    main()
finally:
    print(*({heavy!r} & sys.modules.keys()), file=sys.stderr)
"""


def collect(*, num_runs: int = _RUNS) -> list[Row]:
    """Measure and return the rows."""
    rows = [
        _import_row("import metagpt_fast", "import metagpt_fast", num_runs),
        _import_row("import of all that merge needs", "import metagpt_fast; metagpt_fast.merge", num_runs),
        _command_row("python -c pass", [sys.executable, "-c", "pass"], num_runs, []),
    ]
    for argument in ("--help", "--version"):
        command = [*_program(), argument]
        rows.append(_command_row(f"metagpt-fast {argument}", command, num_runs, _imported_by(argument)))
    return rows


def _program() -> list[str]:
    """Return the installed command, or the module where only the source tree is on the path."""
    script = Path(sys.executable).with_name("metagpt-fast")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "metagpt_fast"]


def _import_row(name: str, statement: str, num_runs: int) -> Row:
    seconds = []
    imported: list[str] = []
    for _ in range(1 + num_runs):  # the first one may have to compile and to read from the disk
        words = _python(_TIME_IMPORT.format(statement=statement, heavy=set(_HEAVY))).stdout.split()
        seconds.append(float(words[0]))
        imported = words[1:]
    return _row(name, seconds[1:], imported)


def _imported_by(argument: str) -> list[str]:
    return _python(_RUN_COMMAND.format(argument=argument, heavy=set(_HEAVY))).stderr.split()


def _command_row(name: str, command: list[str], num_runs: int, imported: list[str]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        usages = [
            run_measured(command, folder=Path(folder), environment=clean_environment(), samples_memory=False)
            for _ in range(1 + num_runs)
        ]
    return _row(name, [usage.seconds for usage in usages[1:]], imported)


def _row(name: str, seconds: list[float], imported: list[str]) -> Row:
    return Row("startup", name, {"imported": sorted(imported)}, {"seconds": Spread.of(seconds)})


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python, outside of the source tree."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != os.EX_OK:
        raise ProcessError(f"exit status {done.returncode} from Python:\n{done.stderr.strip()}")
    return done


@click.command()
@click.option("--runs", "num_runs", default=_RUNS, show_default=True)
@click.option("--rows", "rows_file", type=click.Path(path_type=Path), help="Write the rows as JSON, for run.py.")
def main(num_runs: int, rows_file: Path | None) -> None:
    """Measure imports and the command's answers."""
    rows = collect(num_runs=num_runs)
    save_or_print(rows, rows_file)


if __name__ == "__main__":
    main()
