"""The commands that look and write no checkpoint: ``measure``, ``methods`` and ``info``."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import (
    SectionCommand,
    display_options,
    exclude_option,
    html_option,
    input_arguments,
    json_option,
    option,
    speed_options,
)


@click.command(
    "measure",
    cls=SectionCommand,
    usage="[OPTIONS] BASE MODEL [MODEL ...]",
    short_help="Norms, cosines and coefficients of fine-tuned models.",
)
@input_arguments
@option("Output", "--out", "-o", metavar="FILE.json", help="Save it, for merge --measurement FILE.json.")
@html_option("Output")
@exclude_option("Output")
@speed_options
@display_options
def measure_command(
    base: str,
    models: tuple[str, ...],
    *,
    out: str | None,
    html: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure how far each MODEL moved from BASE, and in which directions, without merging.

    \b
        metagpt-fast measure base chat math code -o measured.json

    Reads every file once and prints ‖τ_t‖, the cosines between the task vectors τ_t = θ_t − θ₀, and the
    coefficients that merge would use. Cosines near 0 are what MetaGPT assumes; near 1, two models learned
    the same. With -o the numbers are saved, and any later merge of these models, or of some of them, skips
    this pass:

    \b
        metagpt-fast merge base chat math -o merged --measurement measured.json

    With --html the numbers become a page to look at, by layer and module: one file, without scripts.
    """  # noqa: D301
    from .console import print_json, print_warnings
    from .merging import measure
    from .progress import open_progress

    if html is not None:
        from .page import check_page_path

        check_page_path(html)
    with open_progress(quiet=quiet) as progress:
        measurement = measure(base, list(models), out=out, progress=progress, **settings)
    if html is not None:
        from .page import save_page

        save_page(measurement, html)
    if as_json:
        print_json(measurement.to_dict())
        print_warnings(measurement.warnings())
        return
    from .tables import print_measurement

    print_measurement(measurement, saved_to=out, page=html)


@click.command(
    "methods",
    cls=SectionCommand,
    usage="[OPTIONS] [NAME]",
    short_help="The merge methods and their parameters.",
)
@click.argument("name", metavar="[NAME]", required=False)
@json_option
def methods_command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain one: what it computes, its parameters, its paper.

    \b
        metagpt-fast methods
        metagpt-fast methods ties
        metagpt-fast merge base chat math -o out --method ties --set density=0.5
    """  # noqa: D301
    from .methods import describe_methods

    described = describe_methods(name)
    if as_json:
        from .console import print_json

        print_json(described)
        return
    from .method_tables import print_method, print_methods

    if name is None:
        print_methods(described)
    else:
        print_method(described[0])


@click.command("info", cls=SectionCommand, short_help="Versions, processor, memory, GPUs, backends and why not.")
@json_option
def info_command(as_json: bool) -> None:
    """Show what this machine offers and what metagpt-fast will use.

    \b
        metagpt-fast info
        METAGPT_FAST_ISA=scalar metagpt-fast info
    """  # noqa: D301
    from .info import collect

    if as_json:
        from .console import print_json

        print_json(collect())
        return
    from .tables import print_info

    print_info(collect())
