"""Rows of suite ``scale`` as Markdown: points, the lines through them, and the plans of real models."""

from __future__ import annotations

from collections.abc import Sequence

from benchlib.fits import SWEEPS, scale_series
from benchlib.markdown import markdown_table
from benchlib.rows import Row
from benchlib.show import format_number, format_spread

_METRICS = {"s": "seconds", "anonymous MB": "peak_anonymous_mb", "resident MB": "peak_resident_mb"}
_LINES = {"s": "seconds", "CPU s": "cpu_seconds"} | dict(list(_METRICS.items())[1:])
_WORDS = (
    "How merges grow. A base and three models in bf16, warm, `--no-sync`, process start included; one thing changes in "
    "each sweep. The lines are least squares of the relative deviations; behind them is the largest deviation."
)
_LLAMAS = (
    "The shapes of real models as sparse files, base and three models in shards of 5 GB: `merge --dry-run`, process "
    "start included. Reads and writes are those of granularity `model`, which reads the files twice."
)


def scale_tables(rows: Sequence[Row]) -> str:
    """Return everything about the rows of suite ``scale``, which there are."""
    parts = []
    if series := scale_series(rows):
        lines, points = [], []
        for each in series:
            _, _, words = SWEEPS[each.sweep]
            cells = []
            for head, metric in _LINES.items():
                line, unit = each.line(metric), head.split(" ")[-1]
                cells.append(line.text(unit) if line is not None else "")
            lines.append([f"{each.task}, x {words}", *cells])
            for row in each.rows:
                facts = row.parameters
                counts = (f"{facts['num_parameters'] / 1e9:.2f} B", facts["num_models"], facts["num_tensors"],
                          facts["num_shards"])  # fmt: skip
                metrics = (row.metrics.get(metric) for metric in _METRICS.values())
                points.append([f"{each.sweep}: {each.task}", *map(str, counts),
                               *(format_spread(spread) if spread else "" for spread in metrics)])  # fmt: skip
        heads = ["sweep and command", "parameters", "T", "tensors", "shards", *_METRICS]
        parts += [_WORDS, markdown_table(["line", *_LINES], lines), markdown_table(heads, points)]
    llamas = [row for row in rows if row.suite == "scale" and row.parameters["sweep"] not in SWEEPS]
    if llamas:
        lines = []
        for row in llamas:
            facts = row.parameters
            reads = (facts["nbytes_measured"] + facts["nbytes_combined"]) / 1e12
            lines.append([
                row.name.split(":")[0], f"{facts['num_parameters'] / 1e9:.1f} B", str(facts["num_tensors"]),
                str(facts["num_shards"]), *(format_spread(row.metrics[metric]) for metric in _METRICS.values()),
                f"{format_number(reads)} TB", f"{format_number(facts['nbytes_written'] / 1e12)} TB",
            ])  # fmt: skip
        heads = ["model", "parameters", "tensors", "shards a model", *_METRICS, "would read", "would write"]
        parts += [_LLAMAS, markdown_table(heads, lines)]
    return "\n\n".join(parts)
