"""The ``metagpt-fast`` command: arguments and help; the work is in the modules it calls.

Everything but click is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import gc
import os
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import click

from .cli_bench import bench_command
from .cli_errors import ReportingGroup, run_and_exit
from .cli_inspect import info_command, measure_command, methods_command
from .cli_options import (
    AssignmentType,
    CoefficientsType,
    SectionCommand,
    assignments_to_dict,
    display_options,
    exclude_option,
    html_option,
    input_arguments,
    nonfinite_option,
    option,
    output_options,
    speed_options,
)
from .cli_output import check_page, save_report_page, show_plan, show_report
from .cli_verify import verify_command

_EPILOG = """\b
Exit status: 0 done, 1 a problem with the work, 2 wrong usage, 130 Ctrl-C.

\b
Environment:
  METAGPT_FAST_ISA      kernels: scalar, avx2, avx512 or neon [the best]
  METAGPT_FAST_THREADS  threads where --threads is not given [all cores]
  METAGPT_FAST_DEBUG    1 shows the traceback of an error
  NO_COLOR              any value turns colours off
"""

_GC_THRESHOLD = 50_000


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    # NumPy's linear algebra is not used here, and starting its thread pool takes 50 ms.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The plan of 50,000 tensors is millions of objects without cycles. Looking for cycles among all of them, each time
    # that a quarter more had come, took a quarter of such a merge's CPU time.
    gc.set_threshold(_GC_THRESHOLD)
    run_and_exit(lambda: cli(prog_name="metagpt-fast"))


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from ._version import __version__

        click.echo(f"metagpt-fast {__version__}")
        ctx.exit()


@click.group(
    cls=ReportingGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog=_EPILOG,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
def cli() -> None:
    """Merge fine-tuned LLM checkpoints that share a base model, at the speed of the disk.

    \b
    Try it:    metagpt-fast demo
    Merge:     metagpt-fast merge base chat math code -o merged
    Look:      metagpt-fast measure base chat math code
    How long?  metagpt-fast bench

    Each command explains itself: metagpt-fast merge --help
    """  # noqa: D301


@cli.command(
    "merge",
    cls=SectionCommand,
    usage="[OPTIONS] BASE MODEL [MODEL ...] -o OUT",
    short_help="Merge fine-tuned models into one checkpoint.",
)
@input_arguments
@option(
    "Output",
    "--out",
    "-o",
    required=True,
    metavar="OUT",
    help="Folder to make; or a name that ends in .safetensors, for one bare file.",
)
@option(
    "Output",
    "--dtype",
    type=click.Choice(["keep", "bf16", "f16", "f32", "f64"]),
    default="keep",
    help="Dtype of the merged tensors; keep takes the base's.",
)
@output_options
@option("Output", "--dry-run", is_flag=True, help="Read headers only, print the plan, write nothing.")
@option(
    "Method",
    "--method",
    metavar="NAME",
    default="metagpt",
    help="metagpt: λ from the norms. task_arithmetic: λ as given, or 0.3 each. linear: weighted average of the models. "
    "ties, dare_linear, della, slerp, ...: metagpt-fast methods lists all of them.",
)
@option(
    "Method",
    "--granularity",
    type=click.Choice(["model", "layer", "tensor"]),
    help="What one λ per model is computed over. model is the paper's and reads the files twice; "
    "layer and tensor read them once.  [default: model for metagpt, else the method's]",
)
@option(
    "Method",
    "--exponent",
    type=float,
    metavar="P",
    help="metagpt: λ_t ∝ ‖τ_t‖^P. 2 is the paper's, 0 the average, below 0 favours small changes.  [default: 2]",
)
@option(
    "Method",
    "--coefficients",
    type=CoefficientsType(),
    metavar="λ1,λ2,...",
    help="One λ per MODEL, in their order, for methods that take them as given; or metagpt, which computes them for "
    "the methods that prune.",
)
@option(
    "Method",
    "--set",
    "parameters",
    type=AssignmentType(),
    callback=assignments_to_dict,
    metavar="PARAMETER=VALUE",
    multiple=True,
    help="Any other parameter of the method (metagpt-fast methods NAME); may be repeated.",
)
@exclude_option("Method")
@option(
    "Method",
    "--measurement",
    metavar="FILE",
    help="Norms and cosines of these models: used if FILE exists (saves reading the files once), "
    "written if it does not.",
)
@nonfinite_option
@html_option("Method")
@speed_options
@display_options
def merge_command(
    base: str,
    models: tuple[str, ...],
    out: str,
    *,
    dry_run: bool,
    html: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Merge MODELs, all fine-tuned from BASE, into a checkpoint at OUT.

    \b
        metagpt-fast merge Llama-2-7b Llama-2-7b-chat MAmmoTH-7B -o merged

    BASE and each MODEL are a Hugging Face folder with safetensors files, or one .safetensors file. OUT gets
    the merged shards, BASE's config and tokenizer, a model card, and metagpt_fast.json with every number
    printed here.

    Each model's change from the base, its task vector τ_t = θ_t − θ₀, is scaled and added to the base.
    MetaGPT takes the scaling coefficients from the weights alone, without data or search:

    \b
        θ_merged = θ₀ + Σ_t λ_t τ_t        λ_t = ‖θ_t − θ₀‖² / Σ_k ‖θ_k − θ₀‖²

    See the plan, take λ per layer (reads the files once), choose λ yourself, keep what was measured:

    \b
        metagpt-fast merge base chat math -o out --dry-run
        metagpt-fast merge base chat math -o out --granularity layer
        metagpt-fast merge base chat math -o out \\
            --method task_arithmetic --coefficients 0.4,0.6
        metagpt-fast merge base chat math -o out --measurement measured.json
    """  # noqa: D301
    if html is not None:
        check_page(html, out, base, models, settings)
    if dry_run:
        from .jobs import has_measurement
        from .merging import plan_merge, plan_output
        from .recipe import parse_memory

        parse_memory(settings["memory"])
        chosen = {name: settings[name] for name in signature(plan_merge).parameters if name in settings}
        plan = plan_merge(base, list(models), **chosen)
        shards = plan_output(plan, Path(out), settings["max_shard_size"], overwrite=settings["overwrite"])
        is_measured = has_measurement(plan, settings["measurement"])
        show_plan(plan, shards, out, as_json=as_json, is_measured=is_measured)
        return
    from .merging import merge
    from .progress import open_progress

    with open_progress(quiet=quiet) as progress:
        report = merge(base, list(models), out, progress=progress, **settings)
    if html is not None:
        save_report_page(report, html)
    show_report(report, as_json=as_json, page=html)


@cli.command(
    "run",
    cls=SectionCommand,
    usage="[OPTIONS] RECIPE.yaml OUT",
    short_help="Merge what a recipe says, in mergekit's language.",
)
@click.argument("recipe", metavar="RECIPE.yaml")
@click.argument("out", metavar="OUT")
@output_options
@option("Output", "--dry-run", is_flag=True, help="Read headers only, print the plan tensor by tensor, write nothing.")
@nonfinite_option
@speed_options
@display_options
def run_command(recipe: str, out: str, *, dry_run: bool, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Merge what RECIPE.yaml says into a checkpoint at OUT.

    The recipe is in mergekit's configuration language:

    \b
        merge_method: ties
        base_model: base
        models:
          - model: chat
            parameters: {weight: 0.5, density: 0.6}
          - model: math
            parameters: {weight: [0.2, 0.8]}     # a gradient over the layers
        parameters: {density: 0.4}
        dtype: float32
        out_dtype: bfloat16

    Models may be merged whole (models:) or by ranges of layers (slices:); parameters may differ by tensor
    (filter:). What is not supported is refused by name and line. docs/recipes.md has the language.

    \b
        metagpt-fast run recipe.yaml merged --dry-run
        metagpt-fast run recipe.yaml merged
    """  # noqa: D301
    from .merging import plan_output, run
    from .recipe import parse_memory
    from .recipe_plan import plan_recipe

    if dry_run:
        parse_memory(settings["memory"])
        plan = plan_recipe(recipe)
        shards = plan_output(plan, Path(out), settings["max_shard_size"], overwrite=settings["overwrite"])
        show_plan(plan, shards, out, as_json=as_json, by_tensor=True)
        return
    from .progress import open_progress

    with open_progress(quiet=quiet) as progress:
        report = run(recipe, out, progress=progress, **settings)
    show_report(report, as_json=as_json)


for _command in (measure_command, verify_command, bench_command, methods_command, info_command):
    cli.add_command(_command)


@cli.command(
    "demo",
    cls=SectionCommand,
    usage="[OPTIONS] [DIR]",
    short_help="Make a small base and three fine-tunes, merge them, show the result.",
)
@click.argument("folder", metavar="[DIR]", required=False)
@option(
    "Options",
    "--size",
    type=click.Choice(["tiny", "demo", "1.1b"]),
    default="demo",
    help="tiny: under 1 MB per model. demo: 150 MB. 1.1b: 2.2 GB, the shape of TinyLlama.",
)
@option("Options", "--quiet", "-q", is_flag=True, help="No progress; results still show.")
def demo_command(folder: str | None, size: str, quiet: bool) -> None:
    """Make a small family of checkpoints, merge it, check the result and show the numbers.

    \b
        metagpt-fast demo
        metagpt-fast demo my-family --size tiny

    The family is a Llama-shaped base and three fine-tunes of it with random weights: it shows the mechanics
    and the speed, not the quality of a merge. It is made in a temporary folder and removed, or kept in DIR.
    """  # noqa: D301
    from .demo import run_demo

    run_demo(folder, size=size, quiet=quiet)
