"""The rows of bench_mergekit_fast.py as Markdown: one line per method, mergekit's time beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import markdown_table
from .rows import Row
from .show import format_number, format_spread

_CONDITIONS = (
    "`mergekit-yaml-fast --no-sync` in turns with `mergekit-yaml` at its fastest options, same recipe "
    "(`dtype: bfloat16`), same files, warm. Whole: the process, with mergekit's imports and planning, which are in "
    "both. Planned: from the end of mergekit's planning to the end of the command. Memory: peak anonymous, above what "
    "the imports take. Where mergekit takes minutes it ran once, and its time is compared with each of ours."
)


def mergekit_table(rows: Sequence[Row]) -> str:
    """Return the conditions and the table, or nothing where there are no such rows."""
    rows = [row for row in rows if row.suite == "mergekit"]
    theirs = {row.parameters["method"]: row for row in rows if not row.name.startswith("mergekit-yaml-fast")}
    lines = []
    for row in rows:
        method = row.parameters["method"]
        if row is theirs[method]:
            continue
        ours, other = row.metrics, theirs[method].metrics
        lines.append([
            f"`{method}`",
            format_spread(ours["seconds"]), format_number(other["seconds"].median),
            format_spread(ours["speedup_mergekit_fast"]),
            format_spread(ours["seconds_after_planning"]), format_number(other["seconds_after_planning"].median),
            format_spread(ours["speedup_after_planning"]),
            *(format_number(each["peak_above_imports_mb"].median) if "peak_above_imports_mb" in each else ""
              for each in (ours, other)),
        ])  # fmt: skip
    if not lines:
        return ""
    heads = ["method", "whole, s", "mergekit, s", "x", "planned, s", "mergekit, s", "x", "MB", "mergekit, MB"]
    return f"{_CONDITIONS}\n\n{markdown_table(heads, lines)}"
