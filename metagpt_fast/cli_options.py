"""What the command line's options are made of: help in sections, values that parse themselves, groups."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .cli_errors import remember_json
from .errors import RecipeError
from .quantities import parse_nbytes

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # generic only in newer releases of click
    _ParamType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])


class SectionOption(click.Option):
    """An option that ``--help`` lists under the heading ``section``."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command whose ``--help`` lists the options in sections, and whose usage line comes from ``usage``."""

    def __init__(self, *args: Any, usage: str = "[OPTIONS]", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._usage = usage

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage line."""
        formatter.write_usage(ctx.command_path, self._usage)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options per section, in the order in which the sections first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                # --help, which click adds last, goes with the last section
                section = getattr(parameter, "section", None) or list(sections)[-1]
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records, col_max=24)


def option(section: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """Return a decorator that adds one option to a command, under the heading ``section``."""
    return click.option(*names, cls=SectionOption, section=section, **settings)


class SizeType(_ParamType):
    """A size such as ``1GiB``; checked here, passed on as the text that was typed."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return ``value`` unchanged, or stop with status 2 when it is no size."""
        try:
            parse_nbytes(value)
        except RecipeError as error:
            self.fail(f"{error.what}: got {error.got}, expected {error.expected}", param, ctx)
        return value


class DeviceType(_ParamType):
    """A device such as ``cuda:1``; only its form is checked here."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return ``value`` unchanged, or stop with status 2 when no device is called so."""
        if re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", str(value)) is None:
            self.fail(f"got {value!r}, expected auto, cpu, cuda or cuda:N", param, ctx)
        return value


class NumbersType(_ParamType):
    """Numbers separated by commas, as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers, or stop with status 2 when one of them is none."""
        if isinstance(value, tuple):  # click converts a value twice in some paths
            return value
        try:
            return tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected numbers with commas between them, such as 0.5,0.3,0.2", param, ctx)


class CoefficientsType(NumbersType):
    """Numbers separated by commas, or the word ``metagpt``."""

    name = "coefficients"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word, or the numbers, or stop with status 2."""
        return value if value == "metagpt" else super().convert(value, param, ctx)


class AssignmentType(_ParamType):
    """``PARAMETER=VALUE``, as the pair of a name and a value.

    The value is read as a number, ``true``, ``false`` or ``null``, as a list of them where it has commas, and
    as text otherwise.
    """

    name = "assignment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, object]:
        """Return the name and the value, or stop with status 2 when there is no name or no equals sign."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"got {value!r}, expected PARAMETER=VALUE, such as exponent=2", param, ctx)
        return name.strip(), _parse_value(text.strip())


def assignments_to_dict(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, object], ...]
) -> dict[str, object] | None:
    """Return all ``--set`` options as one dictionary, None without any; a name given twice is wrong usage."""
    parameters: dict[str, object] = {}
    for name, value in pairs:
        if name in parameters:
            raise click.BadParameter(f"{name!r} is set twice", ctx=ctx, param=param)
        parameters[name] = value
    return parameters or None


def _parse_value(text: str) -> object:
    candidates = [text, f"[{text}]"] if "," in text else [text]
    for candidate in candidates:
        try:
            value: object = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return value
    return text


def input_arguments(function: F) -> F:
    """Add BASE and MODEL [MODEL ...]."""
    function = click.argument("models", metavar="MODEL [MODEL ...]", nargs=-1, required=True)(function)
    return click.argument("base", metavar="BASE")(function)


def exclude_option(section: str) -> Callable[[F], F]:
    """Return a decorator that adds --exclude."""
    return option(
        section,
        "--exclude",
        metavar="REGEX",
        help="Keep BASE's tensors whose name matches anywhere, unmerged and unmeasured: '^lm_head|embed'.",
    )


def output_options(function: F) -> F:
    """Add --max-shard-size, --overwrite, --resume, --no-sync and --copy-code."""
    for decorator in (
        option(
            "Output",
            "--copy-code",
            is_flag=True,
            help="Copy BASE's *.py files, for models with code of their own. Read them: loading OUT may run them.",
        ),
        option(
            "Output",
            "--resume",
            is_flag=True,
            help="Go on with the same merge to OUT if it was interrupted; else begin it.",
        ),
        option(
            "Output",
            "--no-sync",
            "sync",
            is_flag=True,
            flag_value=False,
            default=True,
            show_default=False,  # it would be that of syncing
            help="Do not wait until OUT is on the disk: faster, and a power failure may lose it.",
        ),
        option("Output", "--overwrite", is_flag=True, help="Replace OUT if it exists, once the merge is done."),
        option(
            "Output", "--max-shard-size", type=SizeType(), metavar="SIZE", default="5GB", help="Most bytes per file."
        ),
    ):
        function = decorator(function)
    return function


def nonfinite_option(function: F) -> F:
    """Add --allow-nonfinite."""
    return option(
        "Method",
        "--allow-nonfinite",
        is_flag=True,
        help="Merge NaN and Inf as they are, and warn, where nothing is measured; else they end the merge.",
    )(function)


def html_option(section: str) -> Callable[[F], F]:
    """Return a decorator that adds --html."""
    return option(
        section,
        "--html",
        metavar="FILE.html",
        help="Write what was measured as one page for the browser: norms by layer and module, cosines, warnings.",
    )


def speed_options(function: F) -> F:
    """Add --threads, --memory, --io, --device, --device-memory and --backend."""
    section = "Speed and memory"
    for decorator in (
        option(
            section,
            "--backend",
            type=click.Choice(["auto", "cpu", "reference"]),
            default="auto",
            help="cpu: SIMD kernels. reference: NumPy, slow, for checking.",
        ),
        option(
            section,
            "--device-memory",
            type=SizeType(),
            metavar="SIZE",
            default="128MiB",
            help="Memory taken on a GPU, for any size of model.",
        ),
        option(
            section,
            "--device",
            type=DeviceType(),
            metavar="DEVICE",
            default="auto",
            help="cpu, cuda or cuda:N; the output's bytes are the same. auto: cpu, as a merge from files is bound by "
            "reading them.",
        ),
        option(
            section,
            "--io",
            type=click.Choice(["auto", "mmap", "pread"]),
            default="auto",
            help="How inputs are read: mapped, or through buffers (network and FUSE mounts).",
        ),
        option(
            section,
            "--memory",
            type=SizeType(),
            metavar="SIZE",
            default="1GiB",
            help="Most memory for weights in flight; any size of model fits. 512MiB, 2GB ...",
        ),
        option(
            section,
            "--threads",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of threads; the result is the same for any.  [default: all usable cores]",
        ),
    ):
        function = decorator(function)
    return function


def display_options(function: F) -> F:
    """Add --json and --quiet."""
    quiet = option("Display", "--quiet", "-q", is_flag=True, help="No progress; results and warnings still show.")
    return json_option(quiet(function))


def json_option(function: F) -> F:
    """Add --json, which the report of an error looks at too."""
    return option(
        "Display",
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=remember_json,
        help="Print the result, or the error, as JSON and nothing else to stdout.",
    )(function)
