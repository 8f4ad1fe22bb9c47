"""Compares two results of run.py: python bench/compare.py OLD.json NEW.json

Exit status 1 if something got worse by more than both spreads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from benchlib.rows import METRICS, Result, Spread
from benchlib.show import HEADINGS, format_spread

# Smaller changes than this are not told from chance, however small the spread of one run is.
TOLERANCE = 0.03
# The same where one of the results measured only once, and so knows no spread.
TOLERANCE_ONCE = 0.10
_SAME_MACHINE = ("cpu", "num_cores", "isa", "memory_gib")

Judgement = Literal["worse", "better", "same"]


@dataclass(frozen=True)
class Verdict:
    """One metric of one row in two results."""

    suite: str
    row: str
    metric: str
    old: Spread
    new: Spread
    judgement: Judgement

    @property
    def ratio(self) -> float:
        """Return new by old."""
        return self.new.median / self.old.median if self.old.median else float("nan")


def judge(metric: str, old: Spread, new: Spread) -> Judgement:
    """Return whether the metric changed: the spreads do not overlap, and the medians differ by 3 % or more.

    By 10 % or more where one of them was measured once.
    """
    tolerance = TOLERANCE_ONCE if 1 in {old.n, new.n} else TOLERANCE
    if abs(new.median - old.median) < tolerance * abs(old.median):
        return "same"
    (old_low, old_high), (new_low, new_high) = old.interval, new.interval
    if new_low > old_high:
        return "better" if METRICS[metric].better == "higher" else "worse"
    if new_high < old_low:
        return "better" if METRICS[metric].better == "lower" else "worse"
    return "same"


def compare(old: Result, new: Result) -> list[Verdict]:
    """Return a verdict for every metric that both have, that has a direction, and that the machines allow."""
    is_same_machine = all(old.machine.get(fact) == new.machine.get(fact) for fact in _SAME_MACHINE)
    verdicts = []
    for row in new.rows:
        before = old.row(*row.key)
        for metric in row.metrics.keys() & (before.metrics.keys() if before else set()):
            meaning = METRICS[metric]
            if before is None or meaning.better is None or not (is_same_machine or meaning.is_portable):
                continue
            spreads = before.metrics[metric], row.metrics[metric]
            verdicts.append(Verdict(row.suite, row.name, metric, *spreads, judge(metric, *spreads)))
    order = list(METRICS)
    return sorted(verdicts, key=lambda verdict: (verdict.suite, verdict.row, order.index(verdict.metric)))


def unmatched(old: Result, new: Result) -> list[str]:
    """Return the names of rows that only one of the results has."""
    return sorted(f"{suite}: {name}" for suite, name in {row.key for row in old.rows} ^ {row.key for row in new.rows})


def _print(verdicts: Sequence[Verdict], *, shows_all: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", "metric", "old", "new", "new / old", "", box=box.SIMPLE)
    for verdict in verdicts:
        if shows_all or verdict.judgement != "same":
            spreads = format_spread(verdict.old), format_spread(verdict.new)
            table.add_row(verdict.row, HEADINGS[verdict.metric], *spreads, f"{verdict.ratio:.2f}", verdict.judgement)
    console = Console()
    if table.row_count:
        console.print(table)
    counts = {name: sum(verdict.judgement == name for verdict in verdicts) for name in ("worse", "better", "same")}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if changes := sorted(
        ((abs(verdict.ratio - 1), verdict) for verdict in verdicts if verdict.old.median), key=lambda change: change[0]
    ):
        (half, _), (most, verdict) = changes[len(changes) // 2], changes[-1]
        furthest = f"{100 * most:.1f} % ({verdict.row}, {HEADINGS[verdict.metric]})"
        console.print(f"medians differ by {100 * half:.1f} % (the median of all), at most {furthest}", soft_wrap=True)


@click.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("new", type=click.Path(path_type=Path, exists=True))
@click.option("--all", "shows_all", is_flag=True, help="Also what did not change.")
def main(old: Path, new: Path, shows_all: bool) -> None:
    """Compare two results of run.py; exit status 1 if something got worse."""
    try:
        results = Result.load(old), Result.load(new)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    verdicts = compare(*results)
    _print(verdicts, shows_all=shows_all)
    for name in unmatched(*results):
        click.echo(f"only in one of them: {name}")
    if not verdicts:
        raise click.ClickException("the results have nothing in common that can be compared")
    sys.exit(1 if any(verdict.judgement == "worse" for verdict in verdicts) else 0)


if __name__ == "__main__":
    main()
