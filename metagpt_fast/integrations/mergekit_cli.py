"""``mergekit-yaml-fast``: mergekit-yaml with the engine of this package."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cli_errors import ReportingCommand, run_and_exit
from ..errors import MetagptFastError, RecipeError, suggestion
from .mergekit_config import TOP_LEVEL, check_version, mergekit_errors

# Options of mergekit that change how it works, not what comes out, and what is true of each here.
_WITHOUT_EFFECT: Mapping[str, str] = {
    "low_cpu_memory": "memory is bounded (--memory)",
    "clone_tensors": "tensors are written one by one",
    "read_to_gpu": "files are mapped",
    "multi_gpu": "the engine works on the CPU",
    "async_write": "tensors are written while others are merged",
    "write_threads": "every thread writes (--num-threads)",
}


def main() -> None:
    """Run the command: the console script."""
    # Imports make many objects and no garbage: a tenth of their time without the collector.
    gc.disable()
    try:
        check_version()
    except MetagptFastError as error:
        from ..console import print_error

        print_error(error)
        sys.exit(1)
    run_and_exit(_command())


def _command() -> Any:
    """Return the click command, with mergekit's own options."""
    import click

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others deprecate in mergekit
        from mergekit.options import PrettyPrintHelp, add_merge_options

    class Command(PrettyPrintHelp, ReportingCommand):  # type: ignore[misc]
        """mergekit's help, our errors."""

    @click.command("mergekit-yaml-fast", cls=Command)
    @click.argument("config_file")
    @click.argument("out_path")
    @click.option("--overwrite", is_flag=True, help="Replace OUT_PATH if it exists, once the merge is done.")
    @click.option("--resume", is_flag=True, help="Go on with this merge if it was interrupted; else begin it.")
    @click.option("--memory", default="1GiB", show_default=True, help="Bound of the memory that mapped files may take.")
    @click.option(
        "--no-sync", "sync", is_flag=True, flag_value=False, default=True,
        help="Do not wait for the disk, as mergekit does not: after a power failure OUT_PATH may be broken.",
    )  # fmt: skip
    @add_merge_options  # type: ignore[untyped-decorator]
    def command(merge_options: Any, config_file: str, out_path: str, **ours: Any) -> None:
        """Merge what CONFIG_FILE says into OUT_PATH: planned by mergekit, carried out by metagpt_fast.

        Everything that mergekit-yaml takes works here. The output appears when it is whole. docs/integrating.md says
        what differs.
        """
        gc.enable()
        gc.freeze()
        _run(merge_options, config_file, out_path, **ours)

    return command


def _run(options: Any, config_file: str, out_path: str, *, memory: str, **ours: bool) -> None:
    from mergekit.config import MergeConfiguration

    from ..console import print_message, print_warnings
    from ..progress import open_progress
    from ..quantities import format_seconds, parse_nbytes
    from .mergekit import run_merge

    options.apply_global_options()
    parse_nbytes(memory, where="--memory")
    for note in ignored_options(options):
        if not options.quiet:
            print_message(note)
    source = _read(config_file)
    document, notes = with_our_keys(source, config_file, set(MergeConfiguration.model_fields))
    with mergekit_errors(config_file):
        config = MergeConfiguration.model_validate(document)
    with open_progress(quiet=options.quiet) as progress:
        merged = run_merge(
            config, out_path, options, source, memory=memory, progress=progress,
            overwrite=ours["overwrite"], resume=ours["resume"], sync=ours["sync"],
        )  # fmt: skip
    if merged.report is not None:
        print_warnings([*notes, *merged.report.warnings])
    if not options.quiet:
        seconds = format_seconds(merged.seconds)
        print_message(f"{merged.summary}; {seconds}, {format_seconds(merged.seconds_planned)} of them planning")


def ignored_options(options: Any) -> list[str]:
    """Return a sentence for each of mergekit's options that is set and has no effect here."""
    notes = []
    fields = type(options).model_fields
    for name, reason in _WITHOUT_EFFECT.items():
        if getattr(options, name) != fields[name].default:
            notes.append(f"--{name.replace('_', '-')} has no effect: {reason}")
    if options.cuda or options.device not in {None, "cpu"}:
        notes.append(f"--device {options.device} is for tensors that mergekit computes; the engine works on the CPU")
    return notes


def with_our_keys(source: str, where: str, known: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration, with this package's top-level keys as parameters, and warnings about unknown keys.

    Args:
        source: YAML.
        where: the file, for messages.
        known: mergekit's top-level keys; it ignores all others.

    Raises:
        RecipeError: it is no YAML mapping, or a key is there twice.
    """
    import yaml

    try:
        document = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise RecipeError("not valid YAML", where=where, got=error) from error
    if not isinstance(document, dict):
        raise RecipeError("not a configuration", where=where, got=type(document).__name__, expected="keys and values")
    ours = {name: document.pop(name) for name in TOP_LEVEL if name in document}
    if ours:
        parameters = document.get("parameters") or {}
        twice = next((name for name in ours if name in parameters), None)
        if twice is not None:
            raise RecipeError(f"{twice} is there twice", where=where, got="also under parameters", expected="it once")
        document["parameters"] = {**parameters, **ours}
    notes = []
    for name in document:
        if name not in known:
            hint = suggestion(str(name), known)
            notes.append(f"{where}: mergekit knows no {name!r} and ignores it" + (f"; {hint}" if hint else ""))
    return document, notes


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(f"cannot be read ({reason})", where=path) from error
