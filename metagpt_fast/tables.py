"""The tables that show a merge, a measurement or this machine: coefficients, norms, cosines, times."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .console import open_console, print_warnings
from .method_tables import print_tensors
from .methods import changed_parameters
from .quantities import format_count, format_nbytes, format_norm, format_rate, format_seconds
from .table_parts import make_table, settings
from .untrusted import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from .checkpoint import Checkpoint
    from .measurement import Measurement
    from .output_shards import OutputShard
    from .plan import MergePlan
    from .report import MergeReport

_MAX_COSINE_COLUMNS = 8
_SHARE_BAR_WIDTH = 20
_SPARKLINE_WIDTH = 28
_SPARKS = "▁▂▃▄▅▆▇█"


def print_report(report: MergeReport, console: Console | None = None, *, page: str | None = None) -> None:
    """Print a merge's result: coefficients, norms, cosines, what was written (and ``page``), how fast, warnings."""
    console = open_console() if console is None else console
    labels = [printable(label) for label in report.labels]
    console.print()
    if len(report.scopes) == 1:
        _print_coefficients(
            console,
            labels,
            [float(value) for value in report.coefficients[0]],
            None if report.norms is None else [float(norm) for norm in report.norms],
            report.base_norm,
        )
    else:
        _print_scope_coefficients(console, labels, report)
    if report.cosines is not None:
        _print_cosines(console, labels, report.cosines.tolist())

    console.print()
    nbytes = report.nbytes_read + report.nbytes_written
    measured = "measurement reused"
    if not report.measurement_reused:
        measured = f"measure {format_seconds(report.seconds_measure)}"
    num_merged = report.num_tensors - report.num_copied
    copied = f", {report.num_copied} copied from the base" if report.num_copied else ""
    _print_facts(
        console,
        {
            "method": _method(report.method, None if report.recipe else report.parameters, report.granularity),
            "tensors": f"{num_merged} merged{copied}; {format_count(report.num_parameters)} parameters, "
            f"dtype {report.out_dtype}",
            "time": f"{format_seconds(report.seconds)} ({measured}, combine {format_seconds(report.seconds_combine)})",
            "throughput": f"{format_rate(nbytes, report.seconds)}: {format_nbytes(report.nbytes_read)} read, "
            f"{format_nbytes(report.nbytes_written)} written",
            "ran on": f"{report.backend} backend, {report.isa}, {_plural(report.num_threads, 'thread')}, {report.io}",
            "device": f"{report.device} ({report.device_reason})",
            "output": f"{report.out} ({_plural(len(report.shards), 'shard')})",
            **({} if page is None else {"page": page}),
        },
    )
    print_warnings(report.warnings, console)


def print_plan(
    plan: MergePlan,
    shards: Sequence[OutputShard],
    out: str,
    console: Console | None = None,
    *,
    by_tensor: bool = False,
    is_measured: bool = False,
) -> None:
    """Print what a merge would do: what is read, merged, copied and written; ``by_tensor`` in detail.

    ``is_measured``: nothing is to be measured, because a measurement is reused.
    """
    console = open_console() if console is None else console
    if by_tensor:
        print_tensors(plan, console)
        console.print()
    recipe = plan.recipe
    passes = f"{format_nbytes(plan.nbytes_combined)}"
    if is_measured:
        passes = f"{passes} to combine; the measurement is reused"
    elif plan.reads_twice:
        passes = f"{format_nbytes(plan.nbytes_measured)} to measure, then {passes} to combine"
    in_scopes = ""
    if recipe.granularity == "layer":
        in_scopes = f" in {_plural(len(plan.scopes), 'layer')}"
    dtypes = sorted({tensor.out_dtype.name for tensor in plan.merged})
    _print_facts(
        console,
        {
            "method": _method(
                recipe.method.name, None if recipe.text else recipe.method.parameters(), recipe.granularity
            ),
            "base": _checkpoint(plan.base),
            **{f"model {t}": f"{_checkpoint(model)}" for t, model in enumerate(plan.models, start=1)},
            "tensors": f"{len(plan.merged)} to merge{in_scopes}, {len(plan.copied)} to copy from the base",
            "parameters": f"{format_count(plan.num_parameters)}, merged to {', '.join(dtypes)}",
            "reads": passes,
            "writes": f"{format_nbytes(plan.nbytes_written)} in {_plural(len(shards), 'shard')}",
            "output": out,
        },
    )
    console.print()
    console.print("dry run: only headers were read, nothing was written")
    print_warnings([*plan.warnings, *plan.recipe.method.warnings()], console)


def print_measurement(
    measurement: Measurement, *, saved_to: str | None = None, page: str | None = None, console: Console | None = None
) -> None:
    """Print what was measured: the paper's coefficients, norms and cosines, then warnings."""
    console = open_console() if console is None else console
    labels = [printable(label) for label in measurement.labels]
    console.print()
    _print_coefficients(
        console,
        labels,
        [float(value) for value in measurement.coefficients()],
        [float(norm) for norm in measurement.norms],
        measurement.base_norm,
    )
    _print_cosines(console, labels, measurement.cosines.tolist())
    files = {name: file for name, file in (("saved to", saved_to), ("page", page)) if file is not None}
    if files:
        console.print()
        _print_facts(console, files)
    print_warnings(measurement.warnings(), console)


def print_info(info: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the dictionary of info.collect(): a heading per group, a line per fact."""
    console = open_console() if console is None else console
    machine, kernels, gpus = info["machine"], info["kernels"], info["gpus"]
    cores = f"{machine['num_cores_usable']} of {machine['num_cores']} usable"
    if machine["cgroup_core_limit"] is not None:
        cores += f", limited to {machine['cgroup_core_limit']:g} by the container"
    memory = f"{_size(machine['memory_nbytes'])}, {_size(machine['memory_available_nbytes'])} available"
    if machine["cgroup_memory_limit_nbytes"] is not None:
        memory += f", limited to {_size(machine['cgroup_memory_limit_nbytes'])} by the container"
    forced = ", ".join(f"{name}={value}" for name, value in kernels["environment"].items())
    groups: dict[str, Mapping[str, str]] = {
        "versions": {name: value or "not installed" for name, value in info["versions"].items()},
        "machine": {"os": machine["os"], "cpu": machine["cpu"], "cores": cores, "memory": memory},
        "kernels": {"error": kernels["error"]}
        if "error" in kernels
        else {
            "instruction set": f"{kernels['isa']} (supported: {', '.join(kernels['supported_isas'])})",
            "threads": str(kernels["num_threads"]),
            "environment": forced or "nothing set",
        },
        "gpus": {"none": gpus}
        if isinstance(gpus, str)
        else {
            str(index): ", ".join(f"{name} {value}" for name, value in gpu.items()) for index, gpu in enumerate(gpus)
        },
        "backends": info["backends"],
    }
    for group, facts in groups.items():
        console.print(Text(group, style="bold"))
        _print_facts(console, facts, indent=2)


def _print_coefficients(
    console: Console,
    labels: Sequence[str],
    coefficients: Sequence[float],
    norms: Sequence[float] | None,
    base_norm: float | None,
) -> None:
    """One row per model: λ, its share of Σ|λ|, and if measured ‖τ‖ and ‖τ‖ as a fraction of the base's norm."""
    measured = () if norms is None else ("‖τ‖", "‖τ‖ / ‖θ₀‖")
    table = make_table("model", "λ", "share", *measured, left=("model", "share"))
    total = sum(abs(value) for value in coefficients)
    for t, label in enumerate(labels):
        share = _share(console, abs(coefficients[t]) / total if total > 0 else 0.0)
        table.add_row(label, f"{coefficients[t]:.4f}", share, *_norm_cells(norms, t, base_norm))
    console.print(table)


def _norm_cells(norms: Sequence[float] | None, t: int, base_norm: float | None) -> list[str]:
    if norms is None:
        return []
    return [format_norm(norms[t]), f"{100 * norms[t] / base_norm:.2f} %" if base_norm else "–"]


def _print_scope_coefficients(console: Console, labels: Sequence[str], report: MergeReport) -> None:
    """One row per model: mean, least and largest λ over the layers or tensors, and their course."""
    num_scopes = len(report.scopes)
    # Where parameters differ by tensor there are more rows than scopes of the granularity.
    course = f"λ over {num_scopes} {'tensor' if report.granularity == 'model' else report.granularity}s"
    measured = () if report.norms is None else ("‖τ‖",)
    table = make_table("model", "λ mean", "λ min", "λ max", course, *measured, left=("model", course))
    highest = float(report.coefficients.max())
    for t, label in enumerate(labels):
        values = [float(value) for value in report.coefficients[:, t]]
        table.add_row(
            label,
            f"{sum(values) / num_scopes:.4f}",
            f"{min(values):.4f}",
            f"{max(values):.4f}",
            sparkline(values, highest) if _has_unicode(console) else "",
            *([] if report.norms is None else [format_norm(report.norms[t])]),
        )
    console.print(table)


def _print_cosines(console: Console, labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> None:
    """The cosines between task vectors; columns are numbered, so that long names do not widen them."""
    num_columns = min(len(labels), _MAX_COSINE_COLUMNS)
    if num_columns < 2:
        return
    console.print()
    table = make_table("cosine of τ", *(str(t + 1) for t in range(num_columns)), left=("cosine of τ",))
    for t, label in enumerate(labels):
        row = ["" if k > t else _cosine(cosines[t][k]) for k in range(num_columns)]
        table.add_row(f"{t + 1} {label}", *row)
    console.print(table)
    if num_columns < len(labels):
        console.print(f"  (the first {num_columns} columns; --json has all of them)", style="dim")


def sparkline(values: Sequence[float], highest: float, width: int = _SPARKLINE_WIDTH) -> str:
    """Return at most ``width`` blocks as high as the ``values``, averaged in groups; 0 is the floor."""
    num_groups = min(width, len(values))
    bounds = [i * len(values) // num_groups for i in range(num_groups + 1)]
    blocks = []
    for start, stop in pairwise(bounds):
        mean = sum(values[start:stop]) / (stop - start)
        level = mean / highest if highest > 0 and math.isfinite(mean) else 0.0
        blocks.append(_SPARKS[min(max(int(level * len(_SPARKS)), 0), len(_SPARKS) - 1)])
    return "".join(blocks)


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_nbytes(nbytes)


def _print_facts(console: Console, facts: Mapping[str, str], *, indent: int = 0) -> None:
    """Names on the left, values on the right, in lines that are never cut, so that paths can be copied."""
    width = max(map(len, facts))
    for name, value in facts.items():
        line = Text.assemble(" " * indent, (name.ljust(width), "dim"), "  ", printable(value))
        console.print(line, soft_wrap=True)


def _share(console: Console, share: float) -> Text:
    percent = f"{100 * share:5.1f} %"
    if not _has_unicode(console):
        return Text(percent)
    num_full = round(share * _SHARE_BAR_WIDTH)
    return Text.assemble(percent, " ", ("━" * num_full, "cyan"), ("─" * (_SHARE_BAR_WIDTH - num_full), "dim"))


def _cosine(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _has_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _method(name: str, parameters: Mapping[str, object] | None, granularity: str) -> str:
    if parameters is None:
        return f"{name}, parameters as in the recipe; granularity {granularity}"
    return f"{', '.join([name, *settings(changed_parameters(name, parameters))])}; granularity {granularity}"


def _checkpoint(checkpoint: Checkpoint) -> str:
    nbytes = sum(shard.nbytes for shard in checkpoint.shards)
    return f"{checkpoint.path} ({format_nbytes(nbytes)} in {_plural(len(checkpoint.shards), 'shard')})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
