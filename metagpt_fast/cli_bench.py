"""The command that measures: ``bench``."""

from __future__ import annotations

import click

from .cli_options import SectionCommand, SizeType, display_options, option


@click.command(
    "bench",
    cls=SectionCommand,
    usage="[OPTIONS] [DIR]",
    short_help="How long merges of 7 B, 70 B, 405 B take on this machine.",
)
@click.argument("folder", metavar="[DIR]", default=".")
@option(
    "Options",
    "--size",
    type=SizeType(),
    metavar="SIZE",
    default="2GB",
    help="Most bytes of the files to measure with; 1.3 times as much is needed free. Larger is truer where disks "
    "have fast buffers.",
)
@option(
    "Options",
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads.  [default: all usable cores]",
)
@display_options
def bench_command(folder: str, *, size: str, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Measure this machine and the disk of DIR, and predict how long merges take.

    \b
        metagpt-fast bench
        metagpt-fast bench /data/models

    DIR is a folder on the disk that you will merge on [the current one]. In about two minutes, less on fast
    disks, this measures memory, the kernels, and reading and writing files, out of the page cache and in it.
    From these speeds it predicts merges of a base and three models of 7 B, 70 B and 405 B parameters in bf16,
    says what they would wait for, and checks itself: a small family is merged, and the measured time printed
    beside the predicted one.

    What it writes is removed at the end, also after Ctrl-C. Nothing else should be at work meanwhile.
    docs/benchmarks.md has the formula.
    """  # noqa: D301
    from pathlib import Path

    from .benchmarking.run import run_bench
    from .devices import use_threads
    from .progress import open_progress
    from .quantities import parse_nbytes

    with open_progress(quiet=quiet) as progress, use_threads(threads):
        result = run_bench(Path(folder), parse_nbytes(size, where="--size"), progress)
    if as_json:
        from .console import print_json, print_warnings

        print_json(result.to_dict())
        print_warnings(result.warnings)
        return
    from .benchmarking.tables import print_bench

    print_bench(result)
