"""Rows on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchlib.rows import Row, Spread

_SHOWN = {
    "kernels": ("gb_per_s", "ceiling_gb_per_s", "percent_of_ceiling", "speedup_numpy", "speedup_torch"),
    "ceilings": ("gflop_per_s",),
    "io": ("seconds", "gb_per_s", "ceiling_gb_per_s", "percent_of_ceiling"),
    "merge": ("seconds", "ratio_to_reference", "gb_per_s", "user_seconds", "system_seconds", "peak_anonymous_mb",
              "peak_resident_mb"),
    "methods": ("seconds", "speedup_mergekit", "speedup_mergekit_fast", "user_seconds", "system_seconds",
                "peak_anonymous_mb", "peak_resident_mb"),
    "mergekit": ("seconds", "speedup_mergekit_fast", "seconds_after_planning", "speedup_after_planning",
                 "peak_anonymous_mb", "peak_above_imports_mb"),
    "startup": ("seconds",),
    "scale": ("seconds", "gb_per_s", "user_seconds", "system_seconds", "peak_anonymous_mb", "peak_resident_mb"),
}  # fmt: skip
_FILE_WIDTH = 180
HEADINGS = {
    "seconds": "s",
    "user_seconds": "user s",
    "system_seconds": "sys s",
    "gb_per_s": "GB/s",
    "ceiling_gb_per_s": "ceiling GB/s",
    "percent_of_ceiling": "% of ceiling",
    "speedup_numpy": "x NumPy",
    "speedup_torch": "x torch",
    "speedup_mergekit": "x mergekit",
    "speedup_mergekit_fast": "x mergekit, fast options",
    "ratio_to_reference": "x reference",
    "peak_anonymous_mb": "peak anon MB",
    "peak_resident_mb": "peak RSS MB",
    "seconds_after_planning": "s after planning",
    "speedup_after_planning": "x mergekit after planning",
    "peak_above_imports_mb": "above imports MB",
    "gflop_per_s": "GFLOP/s",
    "percent_cached": "% cached",
}


def format_number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def format_spread(spread: Spread) -> str:
    """Return the median and, in brackets, the interval of a repeated run."""
    if spread.n == 1:
        return format_number(spread.median)
    low, high = spread.interval
    return f"{format_number(spread.median)} ({format_number(low)}..{format_number(high)})"


def print_rows(rows: Sequence[Row]) -> None:
    """Print one table per suite: medians, with the spread in brackets."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for suite, metrics in _SHOWN.items():
        of_suite = [row for row in rows if row.suite == suite]
        if not of_suite:
            continue
        table = Table(title=f"{suite}: median (spread)", box=box.SIMPLE, title_justify="left")
        table.add_column("", no_wrap=True)
        columns = [name for name in metrics if any(name in row.metrics for row in of_suite)]
        for name in columns:
            table.add_column(HEADINGS[name], justify="right")
        table.add_column("n", justify="right")
        for row in of_suite:
            cells = [format_spread(row.metrics[name]) if name in row.metrics else "" for name in columns]
            table.add_row(row.name, *cells, str(next(iter(row.metrics.values())).n))
        console.print(table)
