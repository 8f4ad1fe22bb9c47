"""Draws results of the benchmarks; nothing in a picture is made by hand.

    python bench/plots.py                            the pictures of README and docs, from the results they are from
    python bench/plots.py RESULT.json ... --out DIR  from other results; of rows with one name the last file's count

Writes roofline.svg, merges.svg, methods.svg and scale.svg, each if there are rows for it. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
from benchlib.figures import ACCENT, OTHER, OURS, REFERENCE, Source, load_sources, new_figure, save
from benchlib.fits import SWEEPS, Line, Series, scale_series
from benchlib.rows import Spread
from benchlib.show import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BENCH = Path(__file__).resolve().parent
IMAGES = BENCH.parent / "docs" / "images"
# What README and docs show. The file with the kernels of one quiet run comes after that of the grid: its rows count.
PUBLISHED = tuple(
    BENCH / "results" / f"cpu-2core-avx512{part}.json"
    for part in ("-kernels", "", "-methods", "-methods-quiet", "-scale")
)
_ITEMSIZES = {"bf16": 2, "f16": 2, "f32": 4}
_KERNELS = {"layer_gram": ("o", OURS), "layer_merge": ("s", ACCENT)}
_TASK_COLOURS = {"merge, model": OURS, "merge, layer": ACCENT, "dry run": "#3a8f5c"}


def flops_per_byte(kernel: str, num_models: int, itemsize: int) -> float:
    """Return a kernel's arithmetic intensity, by the bytes that it has to move.

    Per element ``layer_gram`` takes T differences and (T+1)(T+2)/2 products, each added to a sum; ``layer_merge`` T
    differences and T products, each added. Conversions of 16-bit values are not counted.
    """
    differences = num_models
    if kernel == "layer_gram":
        return (differences + (num_models + 1) * (num_models + 2)) / ((1 + num_models) * itemsize)
    return (differences + 2 * num_models) / ((2 + num_models) * itemsize)


def roofline(sources: Sequence[Source]) -> Figure:
    """Draw bytes per second against arithmetic intensity, one panel per number of threads, with the machine's ceilings.

    Memory ceilings are level; arithmetic at most R flop/s is R / intensity bytes/s.
    """
    rows = [source.row for source in sources if source.row.suite == "kernels"]
    arithmetic = {s.row.parameters["threads"]: s.row.metrics["gflop_per_s"].median
                  for s in sources if s.row.suite == "ceilings"}  # fmt: skip
    threads = sorted({row.parameters["threads"] for row in rows})
    figure = new_figure(4.3 * len(threads), 3.9, len(threads), sharey=True)
    low, high = 0.2, 20.0
    for axes, count in zip(figure.axes, threads, strict=True):
        of_count = [row for row in rows if row.parameters["threads"] == count]
        for ceiling, style in (("read", "-"), ("triad", "--")):
            measured = [
                row.metrics["ceiling_gb_per_s"].median for row in of_count if row.parameters["ceiling"] == ceiling
            ]
            if measured:
                label = f"{ceiling}: {median(measured):.1f} GB/s"
                axes.plot([low, high], [median(measured)] * 2, style, color="#444444", lw=1, label=label)
        if count in arithmetic:
            rate = arithmetic[count]
            axes.plot([low, high], [rate / low, rate / high], ":", color="#444444", lw=1.2,
                      label=f"arithmetic: {rate:.0f} GFLOP/s (sgemm)")  # fmt: skip
        for row in of_count:
            facts = row.parameters
            marker, colour = _KERNELS[facts["kernel"]]
            x = flops_per_byte(facts["kernel"], facts["num_models"], _ITEMSIZES[facts["dtype"]])
            rate_spread = row.metrics["gb_per_s"]
            _point(axes, x, rate_spread, marker, colour, is_filled=facts["dtype"] != "f32")
            above = facts["kernel"] == "layer_gram"
            axes.annotate(f"{facts['num_models']}", (x, rate_spread.median), xytext=(0, 6 if above else -12),
                          textcoords="offset points", ha="center", fontsize=6.5, color=colour)  # fmt: skip
        for kernel, (marker, colour) in _KERNELS.items():
            axes.plot([], [], marker, color=colour, label=kernel)
        if {row.parameters["dtype"] for row in of_count} & {"f32"}:
            axes.plot([], [], "o", mfc="white", mec="#444444", label="hollow: f32, else 16 bit")
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(4, 120))
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["¼", "½", "1", "2", "4", "8", "16"])
        axes.set_yticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
        axes.minorticks_off()
        axes.set(xlabel="flop per byte", title=f"{count} thread{'s'[: count - 1]}")
        axes.legend(loc="lower left", fontsize=6.5)
    figure.axes[0].set_ylabel("GB/s")
    figure.suptitle("Kernels in memory and the machine's ceilings (number at a point: models T)", fontsize=10)
    return figure


def _point(axes: Axes, x: float, spread: Spread, marker: str, colour: str, *, is_filled: bool = True) -> None:
    low, high = spread.interval
    axes.errorbar([x], [spread.median], [[spread.median - low], [high - spread.median]], fmt=marker, color=colour,
                  mfc=colour if is_filled else "white", ms=5, lw=0.8)  # fmt: skip


def merges(sources: Sequence[Source]) -> Figure:
    """Draw the seconds of whole merges beside those of ``cat`` and ``cp``, warm and cold."""
    rows = [source.row for source in sources if source.row.suite == "merge"]
    caches = [cache for cache in ("warm", "cold") if any(row.parameters["cache"] == cache for row in rows)]
    cases = {
        cache: [row for row in rows if row.parameters["cache"] == cache and "case" in row.parameters]
        for cache in caches
    }
    figure = new_figure(6.6, 0.36 * sum(map(len, cases.values())) + 1.3, num_rows=len(caches),
                        height_ratios=[max(1, len(cases[cache])) for cache in caches])  # fmt: skip
    for axes, cache in zip(figure.axes, caches, strict=True):
        references = {row.parameters["num_reads"]: row.metrics["seconds"] for row in rows
                      if row.parameters["cache"] == cache and "case" not in row.parameters}  # fmt: skip
        names = []
        for place, row in enumerate(cases[cache]):
            case, num_reads = row.parameters["case"], row.parameters["num_reads"]
            is_ours = "torch" not in case and "mergekit" not in case
            _bar(axes, place - 0.2, row.metrics["seconds"], OURS if is_ours else OTHER)
            if num_reads in references:
                _bar(axes, place + 0.2, references[num_reads], REFERENCE)
            names.append(f"{case} ({num_reads} read{'s'[: num_reads - 1]})")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title("inputs in the page cache" if cache == "warm" else "inputs on the disk only", loc="left")
        axes.set_xlim(left=0)
    axes.set_xlabel("seconds, process start included")
    colours = {"metagpt-fast": OURS, "plain torch": OTHER, "cat of the inputs, cp of a model": REFERENCE}
    handles = [figure.axes[0].barh([0], [0], color=colour) for colour in colours.values()]
    facts = cases[caches[0]][0].parameters
    total = (1 + facts["num_models"]) * facts["model_nbytes"] / 1e9
    size = f"{facts['num_parameters'] / 1e9:.1f} B parameters, {total:.1f} GB"
    figure.legend(handles, list(colours), loc="outside upper center", ncols=3, title_fontsize=10,
                  title=f"Merging a base and {facts['num_models']} models of {size}")  # fmt: skip
    return figure


def _bar(axes: Axes, place: float, spread: Spread, colour: str) -> None:
    low, high = spread.interval
    axes.barh([place], [spread.median], 0.38, color=colour,
              xerr=[[spread.median - low], [high - spread.median]], ecolor="#555555", error_kw={"lw": 0.8})  # fmt: skip
    axes.annotate(format_number(spread.median), (high, place), xytext=(3, 0), textcoords="offset points", va="center",
                  fontsize=7)  # fmt: skip


def methods(sources: Sequence[Source]) -> Figure:
    """Draw how many times mergekit's seconds are ours, method by method."""
    rows = {source.row.name: source.row for source in sources if source.row.suite == "methods"}
    speedups = {
        name: row.metrics["speedup_mergekit"] for name, row in rows.items() if "speedup_mergekit" in row.metrics
    }
    names = sorted(speedups, key=lambda name: speedups[name].median)
    figure = new_figure(6.6, 0.24 * len(names) + 1.1)
    axes = figure.axes[0]
    for place, name in enumerate(names):
        spread = speedups[name]
        low, high = spread.interval
        axes.barh([place], [spread.median], 0.7, color=OURS, xerr=[[spread.median - low], [high - spread.median]],
                  ecolor="#555555", error_kw={"lw": 0.8})  # fmt: skip
        ours, theirs = (rows[each].metrics["seconds"].median for each in (name, f"mergekit: {name}"))
        text = f"{format_number(spread.median)}×   {format_number(theirs)} s → {format_number(ours)} s"
        axes.annotate(text, (high, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="#444444", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="mergekit's time / ours, same recipe and files, in turns", ylim=(-0.6, len(names) - 0.4))
    axes.set_xlim(0, 1.35 * max(speedups[name].interval[1] for name in names))
    sizes = next(iter(rows.values())).parameters
    axes.set_title(f"Every method beside mergekit, {sizes['num_parameters'] / 1e9:.1f} B parameters, warm", loc="left")
    return figure


def scale(sources: Sequence[Source]) -> Figure:
    """Draw time and memory of each sweep, with the lines through them."""
    series = scale_series([source.row for source in sources])
    sweeps = [sweep for sweep in SWEEPS if any(each.sweep == sweep for each in series)]
    figure = new_figure(3.1 * len(sweeps), 5.6, len(sweeps), 2)
    for column, sweep in enumerate(sweeps):
        times, memory = figure.axes[column], figure.axes[len(sweeps) + column]
        _, _, words = SWEEPS[sweep]
        for each in (each for each in series if each.sweep == sweep):
            colour = _TASK_COLOURS[each.task]
            _draw(times, each, "seconds", colour, "o", each.line("seconds"), "s")
            _draw(memory, each, "peak_anonymous_mb", colour, "o", each.line("peak_anonymous_mb"), "MB")
            _draw(memory, each, "peak_resident_mb", colour, "^", None, "MB")
        for axes, top in ((times, 3.2), (memory, 3.6)):
            axes.set(xscale="log", yscale="log", xlabel=words)
            _plain_ticks(axes)
            low, high = axes.get_ylim()
            axes.set_ylim(low / 1.1, high * top)
            axes.legend(loc="upper left", fontsize=6)
        times.set_title(sweep, loc="left")
    figure.axes[0].set_ylabel("seconds of the command")
    figure.axes[len(sweeps)].set_ylabel("peak MB (circles anonymous, triangles resident)")
    figure.suptitle("How merges grow: medians, and the straight lines through them (axes logarithmic)", fontsize=10)
    return figure


def _plain_ticks(axes: Axes) -> None:
    """Label logarithmic axes at 1, 2 and 5 times powers of ten, without exponents."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _draw(axes: Axes, series: Series, metric: str, colour: str, marker: str, line: Line | None, unit: str) -> None:
    points = series.points(metric)
    for (x, _), row in zip(points, series.rows, strict=True):
        _point(axes, x, row.metrics[metric], marker, colour)
    if line is not None:
        xs = [points[0][0] * (points[-1][0] / points[0][0]) ** (i / 60) for i in range(61)]
        label = f"{series.task}: {line.text(unit)}"
        axes.plot(xs, [line.at(x) for x in xs], color=colour, lw=1, label=label)


FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Source]], Figure]]] = {
    "roofline": (("kernels", "ceilings"), roofline),
    "merges": (("merge",), merges),
    "methods": (("methods",), methods),
    "scale": (("scale",), scale),
}


def sources_of(name: str, sources: Sequence[Source]) -> list[Source]:
    """Return what the figure of this name is made from."""
    suites, _ = FIGURES[name]
    chosen = [source for source in sources if source.row.suite in suites]
    if name == "methods" and not any("speedup_mergekit" in source.row.metrics for source in chosen):
        return []
    return chosen


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=IMAGES, help="Folder of the pictures [docs/images].")
@click.option("--format", "suffix", type=click.Choice(["svg", "png"]), default="svg", show_default=True)
def main(results: tuple[Path, ...], out: Path, suffix: str) -> None:
    """Draw RESULTS, or those that README and docs show."""
    try:
        sources = load_sources(results or PUBLISHED)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise click.ClickException("matplotlib is not installed: pip install 'metagpt_fast[bench]'") from error
    for name, (_, draw) in FIGURES.items():
        if chosen := sources_of(name, sources):
            save(draw(chosen), chosen, out / f"{name}.{suffix}")
            click.echo(f"written: {out / name}.{suffix}")


if __name__ == "__main__":
    main()
