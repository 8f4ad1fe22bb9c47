"""What the command line prints: results to stdout, messages to stderr, readable in a terminal and in a pipe.

Names and messages can contain anything a stranger put into a file, so they never reach rich's markup, and
their control characters are written as escapes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .errors import MetagptFastError
from .untrusted import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

# Outside a terminal nothing is wrapped: a log viewer or a pager does that better, and grep finds whole lines.
_PIPE_WIDTH = 240


def open_console(stream: TextIO | None = None) -> Console:
    """Return a console for ``stream`` (default stdout) that neither guesses colours nor reads markup."""
    stream = sys.stdout if stream is None else stream
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_json(value: object, stream: TextIO | None = None) -> None:
    """Print ``value`` as JSON and nothing else; NaN and Inf, which JSON lacks, become null."""
    stream = sys.stdout if stream is None else stream
    stream.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_error(error: MetagptFastError, console: Console | None = None) -> None:
    """Print one error: laid out in lines on a terminal, as a single line elsewhere."""
    console = open_console(sys.stderr) if console is None else console
    if not console.is_terminal:
        console.print(f"error: {printable(error)}", soft_wrap=True)
        return
    console.print(Text.assemble(("error: ", "bold red"), (printable(error.what), "bold")))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("where", error.where),
        ("got", error.got),
        ("expected", error.expected),
        ("what to do", error.hint),
    ):
        if value is not None:
            facts.add_row(name, printable(value))
    if facts.row_count:
        console.print(Padding.indent(facts, 2))


def print_message(text: str, *, style: str = "") -> None:
    """Print one line about the command itself (not about weights) to stderr."""
    open_console(sys.stderr).print(printable(text), style=style, soft_wrap=True)


def print_warnings(warnings: Sequence[str], console: Console | None = None) -> None:
    """Print warnings so that they are seen: one paragraph each, after everything else."""
    console = open_console(sys.stderr) if console is None else console
    for warning in warnings:
        console.print()
        line = Text.assemble(("warning: ", "bold yellow"), printable(warning))
        console.print(line, soft_wrap=not console.is_terminal)


def _finite(value: object) -> object:
    """Copy a tree of dictionaries and lists with every NaN and Inf replaced by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
