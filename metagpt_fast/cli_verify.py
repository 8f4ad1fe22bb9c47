"""The command ``metagpt-fast verify``."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import SectionCommand, SizeType, display_options, option


@click.command(
    "verify",
    cls=SectionCommand,
    usage="[OPTIONS] OUT",
    short_help="Check that an output is what the merge wrote.",
)
@click.argument("out", metavar="OUT")
@option("Checks", "--inputs", is_flag=True, help="Compare the inputs' fingerprints too; a changed input is a problem.")
@option(
    "Checks",
    "--full",
    is_flag=True,
    help="Recompute every tensor and the coefficients, not a sample. Slow: some 20 million elements per second.",
)
@option(
    "Speed and memory",
    "--io",
    type=click.Choice(["auto", "mmap", "pread"]),
    default="auto",
    help="How inputs are read: mapped, or through buffers (network and FUSE mounts).",
)
@option(
    "Speed and memory", "--memory", type=SizeType(), metavar="SIZE", default="1GiB", help="Most memory for weights."
)
@option(
    "Speed and memory",
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads.  [default: all usable cores]",
)
@display_options
@click.pass_context
def verify_command(ctx: click.Context, /, out: str, *, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Check that OUT, the output of merge or run, is what was written.

    \b
        metagpt-fast verify merged
        metagpt-fast verify merged --inputs --full

    Every file is read once and compared with the checksums in metagpt_fast.json, which name a damaged tensor; headers
    and index are checked. If the inputs are where they were and unchanged, a sample of the tensors is computed again
    from them by the NumPy reference and compared bit by bit, and so is every damaged tensor.

    Paths of inputs are those of the merge: relative ones count from the folder where it was run.
    Exit status: 0 nothing wrong, 1 a problem.
    """  # noqa: D301
    from .progress import open_progress
    from .verifying import verify

    with open_progress(quiet=quiet) as progress:
        report = verify(out, progress=progress, **settings)
    if as_json:
        from .console import print_json

        print_json(report.to_dict())
    else:
        from .verify_tables import print_verification

        print_verification(report)
    if not report.ok:
        ctx.exit(1)
