"""Interleaved rounds of processes: every command once per round, each round beginning with another one.

On a shared machine the speed drifts by the minute. What is compared is therefore measured in turns, and ratios are
taken within a round. Between two commands, outside of the measured time, outputs are removed and the file systems
synced: otherwise writing back the output of one would slow the next, or be counted for free.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib.processes import Usage, clean_environment, run_measured
from benchlib.rows import Spread


@dataclass(frozen=True)
class Task:
    """A command to measure.

    Attributes:
        name: unique among the tasks of one run.
        command: program and arguments, made from the path that it may write to, which does not exist.
        max_rounds: slow ones take part in the first rounds only; None: in all.
        prepare: called before each run, outside of the measured time.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    max_rounds: int | None = None
    prepare: Callable[[], None] | None = None


Measured = dict[str, list[Usage | None]]
"""Per task one entry for each round, None where it did not take part."""


def run_rounds(
    tasks: Sequence[Task],
    num_rounds: int,
    folder: Path,
    *,
    rotates: bool = True,
    before_round: Callable[[], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Measure all tasks ``num_rounds`` times, in turns.

    Args:
        tasks: what to run.
        num_rounds: how often.
        folder: existing scratch folder, on the file system that outputs go to.
        rotates: start each round one task later; without, the order within a round is kept.
        before_round: called before each round, for example to check the page cache.
        tell: is given a line per measurement.
    """
    measured: Measured = {task.name: [] for task in tasks}
    environment = clean_environment()
    for number in range(num_rounds):
        if before_round is not None:
            before_round()
        first = number % len(tasks) if rotates else 0
        for task in (*tasks[first:], *tasks[:first]):
            if task.max_rounds is not None and number >= task.max_rounds:
                measured[task.name].append(None)
                continue
            if task.prepare is not None:
                task.prepare()
            out = folder / "out"
            try:
                usage = run_measured(task.command(out), folder=folder, environment=environment)
            finally:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
            measured[task.name].append(usage)
            tell(f"round {number + 1}/{num_rounds}: {task.name}: {usage.seconds:.2f} s")
    return measured


def usage_metrics(usages: Sequence[Usage]) -> dict[str, Spread]:
    """Return wall and CPU time and peak memory, by the names of their metrics, over at least one run."""
    metrics = {
        "seconds": Spread.of([usage.seconds for usage in usages]),
        "user_seconds": Spread.of([usage.user_seconds for usage in usages]),
        "system_seconds": Spread.of([usage.system_seconds for usage in usages]),
    }
    for kind in ("anonymous", "resident"):
        peaks = [peak for usage in usages if (peak := getattr(usage, f"peak_{kind}_nbytes")) is not None]
        if peaks:
            metrics[f"peak_{kind}_mb"] = Spread.of([peak / 1e6 for peak in peaks])
    return metrics
