"""Prints a result of run.py as Markdown; with --write it puts the same rows, in fewer columns, into the README.

python bench/table.py RESULT.json [--write README.md]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from benchlib.markdown import markdown_table
from benchlib.mergekit_table import mergekit_table
from benchlib.rows import Result, Row
from benchlib.scale_table import scale_tables
from benchlib.show import format_number, format_spread

BEGIN, END = "<!-- bench-table -->", "<!-- /bench-table -->"

_MAIN = ("bf16", 3)
_LABELS = {
    "metagpt, model": "`--granularity model`",
    "metagpt, layer": "`--granularity layer`",
    "metagpt, tensor": "`--granularity tensor`",
    "metagpt, model, measured before": "`--measurement FILE`, FILE exists",
    "metagpt, model, on the disk": "`--granularity model`, without `--no-sync`",
    "metagpt, layer, on the disk": "`--granularity layer`, without `--no-sync`",
    "task_arithmetic": "`--method task_arithmetic`",
    "plain torch: task_arithmetic": "plain torch, task arithmetic",
}


def bench_table(result: Result, source: str) -> str:
    """Return the conditions and one table per suite; ``source`` is the JSON's name for readers."""
    parts = [_conditions(result, source)]
    suites = ("merge", "kernels", "io", "startup")
    of_suite = {suite: [row for row in result.rows if row.suite == suite] for suite in suites}
    if of_suite["merge"]:
        parts += [_merge_conditions(of_suite["merge"]), _merge_table(of_suite["merge"])]
    if of_suite["kernels"]:
        parts += [_KERNELS, _kernel_table(of_suite["kernels"])]
    if rates := [f"{row.name.split(' ')[-1]} {format_spread(row.metrics['gflop_per_s'])}" for row in result.rows
                 if row.suite == "ceilings"]:  # fmt: skip
        parts.append(f"NumPy's float32 matrix product, GFLOP/s: {', '.join(rates)}.")
    if of_suite["io"]:
        parts += [_IO, _io_table(of_suite["io"])]
    if of_suite["startup"]:
        parts.append(_startup_table(of_suite["startup"]))
    parts += [table for make in (scale_tables, mergekit_table) if (table := make(result.rows))]
    return _with_methods(parts, result)


def _with_methods(parts: list[str], result: Result) -> str:
    if methods := [row for row in result.rows if row.suite == "methods"]:
        parts += [_METHODS, _method_table(methods)]
    return "\n\n".join(parts)


def readme_table(result: Result, source: str) -> str:
    """Return what a README has room for: every merge, the kernels in bf16 with three models, and the start.

    The reference is a column instead of rows, so that each merge stands beside what it is compared with.
    """
    parts = [_conditions(result, source)]
    of_suite = {suite: [row for row in result.rows if row.suite == suite] for suite in ("merge", "kernels", "startup")}
    if of_suite["merge"]:
        parts += [_merge_conditions(of_suite["merge"]), _short_merge_table(of_suite["merge"], result)]
    if of_suite["kernels"]:
        main_rows = [
            row for row in of_suite["kernels"] if (row.parameters["dtype"], row.parameters["num_models"]) == _MAIN
        ]
        parts += [_KERNELS, _kernel_table(main_rows or of_suite["kernels"])]
    if of_suite["startup"]:
        parts.append(_startup_sentence(of_suite["startup"]))
    return _with_methods(parts, result)


def replace_block(text: str, table: str) -> str:
    """Return the text with the table between the markers.

    Raises:
        ValueError: the text does not have each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and behind it one {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _conditions(result: Result, source: str) -> str:
    machine, versions = result.machine, result.versions
    facts = f"{machine['cpu']}, {machine['num_cores']} cores, {machine['isa'].upper()}"
    if machine["memory_gib"]:
        facts += f", {machine['memory_gib']:.0f} GiB"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("numpy", "torch", "mergekit") if name in versions)
    return (
        f"{facts}, {machine['os']}, {machine['file_system']} (a new file reaches the disk at "
        f"{format_number(machine['disk_write_gb_per_s'])} GB/s), Python {versions['python']}, {packages}; "
        f"{result.created}, commit {result.commit}. Medians, in brackets the spread of the rounds. "
        f"Made from [{Path(source).name}]({source}) by `bench/table.py`; how it is measured: "
        "[bench/README.md](bench/README.md)."
    )


def _merge_conditions(rows: Sequence[Row]) -> str:
    sizes = next((row.parameters for row in rows if "scale" not in row.name), rows[0].parameters)
    return (
        f"Merges of {sizes['num_parameters'] / 1e9:.1f} B parameters in bf16 (TinyLlama's shapes), base and "
        f"{sizes['num_models']} models of {sizes['model_nbytes'] / 1e9:.1f} GB each, process start included. The "
        "reference, in turns with the merges, is `cat` of every input byte as often as the merge reads it, plus `cp` "
        "of one model. Like `cp`, the merges do not wait until the output is on the disk (`--no-sync`), but where it "
        "says so. Warm: inputs in the page cache; cold: none of them, which was verified."
    )


def _merge_table(rows: Sequence[Row]) -> str:
    columns = {
        "s": "seconds",
        "x reference": "ratio_to_reference",
        "GB/s": "gb_per_s",
        "CPU s": "",
        "anonymous MB": "peak_anonymous_mb",
        "resident MB": "peak_resident_mb",
    }
    lines = []
    for row in rows:
        cells = []
        for metric in columns.values():
            if metric == "":
                cpu = [row.metrics[name].median for name in ("user_seconds", "system_seconds") if name in row.metrics]
                cells.append(format_number(sum(cpu)) if cpu else "")
            elif metric in row.metrics:
                spread = row.metrics[metric]
                shows_spread = metric in {"seconds", "ratio_to_reference"}
                cells.append(format_spread(spread) if shows_spread else format_number(spread.median))
            else:
                cells.append("")
        lines.append([row.name, *cells])
    return markdown_table(["merge", *columns], lines)


def _short_merge_table(rows: Sequence[Row], result: Result) -> str:
    """Return one line per merge; the references, which have no case, become a column."""
    references = {
        (row.parameters["cache"], row.parameters["num_reads"]): row.metrics["seconds"]
        for row in rows
        if "case" not in row.parameters and "num_reads" in row.parameters
    }
    lines = []
    for row in rows:
        facts, metrics = row.parameters, row.metrics
        if "num_reads" in facts and "case" not in facts:
            continue
        reference = references.get((facts.get("cache"), facts.get("num_reads")))
        spreads = (metrics["seconds"], reference, metrics.get("ratio_to_reference"))
        numbers = (metrics.get(name) for name in ("gb_per_s", "peak_anonymous_mb", "peak_resident_mb"))
        lines.append([
            _LABELS.get(facts.get("case", ""), row.name), _inputs(facts, result), str(metrics["seconds"].n),
            *(format_spread(spread) if spread else "" for spread in spreads),
            *(format_number(spread.median) if spread else "" for spread in numbers),
        ])  # fmt: skip
    heads = ["merge", "inputs", "rounds", "s", "reference, s", "ratio", "GB/s", "anonymous MB", "resident MB"]
    return markdown_table(heads, lines)


def _inputs(facts: Mapping[str, Any], result: Result) -> str:
    nbytes = (1 + facts["num_models"]) * facts["model_nbytes"]
    memory_gib = result.machine["memory_gib"]
    size = f"{nbytes / 1e9:.1f} GB"
    if memory_gib and nbytes > memory_gib * 2**30:
        return f"{size}, more than the memory"
    return f"{size}, {facts['cache']}"


_KERNELS = (
    "Kernels in memory. Bytes counted: layer_gram (1+T)·n·itemsize, layer_merge (2+T)·n·itemsize. The ceiling is a "
    "plain read, respectively a triad `a = b + 3·c`, by the same threads in turns with the kernel."
)


def _kernel_table(rows: Sequence[Row]) -> str:
    heads = ["kernel", "dtype", "T", "ISA", "threads", "GB/s", "% of the ceiling", "x NumPy", "x torch"]
    lines = []
    for row in rows:
        facts = row.parameters
        metrics = (row.metrics.get(name) for name in ("gb_per_s", "percent_of_ceiling"))
        speedups = (row.metrics.get(name) for name in ("speedup_numpy", "speedup_torch"))
        lines.append([
            f"`{facts['kernel']}`", facts["dtype"], str(facts["num_models"]), facts["isa"], str(facts["threads"]),
            *(format_spread(spread) if spread else "" for spread in metrics),
            *(format_number(spread.median) if spread else "" for spread in speedups),
        ])  # fmt: skip
    return markdown_table(heads, lines)


_IO = (
    "Reading and writing files. Bytes counted: of the files, once. Warm, and into the page cache, the ceiling is a "
    "read of memory, respectively a triad; cold, and until the file is on the disk, it is O_DIRECT by eight threads, "
    "or one thread in order, if that is faster. `measure` is the command at work, kernels included."
)


def _io_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        facts, metrics = row.parameters, row.metrics
        way = facts["way"] if facts.get("io") is None else f"`{facts['way']}`"
        chosen = f" (chose {facts['io']})" if facts["way"] == "--io auto" else ""
        spreads = (metrics.get(name) for name in ("gb_per_s", "ceiling_gb_per_s", "percent_of_ceiling"))
        lines.append([
            f"{facts['action']} {way}{chosen}", _CACHE_STATES.get(facts["cache"], facts["cache"]),
            *(format_spread(spread) if spread else "" for spread in spreads),
        ])  # fmt: skip
    return markdown_table(["way", "files", "GB/s", "ceiling, GB/s", "% of the ceiling"], lines)


_CACHE_STATES = {"cache": "into the page cache", "disk": "until on the disk"}


def _startup_table(rows: Sequence[Row]) -> str:
    lines = [
        [f"`{row.name}`" if " of " not in row.name else row.name, format_spread(row.metrics["seconds"]),
         ", ".join(row.parameters["imported"]) or "none"]
        for row in rows
    ]  # fmt: skip
    return markdown_table(["start", "s", "heavy imports"], lines)


def _startup_sentence(rows: Sequence[Row]) -> str:
    times = ", ".join(
        f"{row.name if ' of ' in row.name else f'`{row.name}`'} {format_spread(row.metrics['seconds'])} s"
        for row in rows
    )
    return f"Start: {times}."


_METHODS = (
    "Every method on the same family, warm, ours with `--no-sync`; in turns with `mergekit-yaml` at its default "
    "options on the same recipe (`dtype: bfloat16`, its fastest; our arithmetic is float32). Anonymous memory is the "
    "peak of the process."
)


def _method_table(rows: Sequence[Row]) -> str:
    """Return one line per method; mergekit's row, where there is one, becomes two columns."""
    theirs = {row.parameters["method"]: row for row in rows if row.name.startswith("mergekit: ")}
    lines = []
    for row in rows:
        if "mergekit" in row.name:
            continue
        other = theirs.get(row.parameters["method"])
        speedup = row.metrics.get("speedup_mergekit")
        lines.append([
            f"`{row.name}`", format_spread(row.metrics["seconds"]),
            format_number(other.metrics["seconds"].median) if other else "",
            format_spread(speedup) if speedup else "",
            format_number(row.metrics["peak_anonymous_mb"].median),
            format_number(other.metrics["peak_anonymous_mb"].median) if other else "",
        ])  # fmt: skip
    heads = ["method", "s", "mergekit, s", "x mergekit", "anonymous MB", "mergekit, anonymous MB"]
    return markdown_table(heads, lines)


@click.command()
@click.argument("result", type=click.Path(path_type=Path, exists=True))
@click.option("--write", "target", type=click.Path(path_type=Path, exists=True), help=f"Replace what {BEGIN} encloses.")
def main(result: Path, target: Path | None) -> None:
    """Print RESULT as Markdown in full, or write its short form into a file."""
    try:
        if target is None:
            click.echo(bench_table(Result.load(result), result.name))
            return
        folder = target.resolve().parent
        if not result.resolve().is_relative_to(folder):
            raise ValueError(f"{result} is not below {folder}: the table could not link to it")
        source = str(result.resolve().relative_to(folder))
        text = replace_block(target.read_text(encoding="utf-8"), readme_table(Result.load(result), source))
        target.write_text(text, encoding="utf-8")
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
