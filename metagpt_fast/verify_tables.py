"""The tables that show a verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from .console import open_console
from .quantities import format_count, format_nbytes, format_seconds
from .table_parts import make_table
from .untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

    from .verify_report import VerifyReport

_MAX_ROWS = 20
_BAD = "bold red"


def print_verification(report: VerifyReport, console: Console | None = None) -> None:
    """Print what was checked, what was not and why, and every problem."""
    console = open_console() if console is None else console
    console.print()
    table = make_table("file", "size", "bytes", left=("file", "bytes"))
    for shard in report.shards[:_MAX_ROWS]:
        state = Text(shard.state, style="" if shard.state in {"same", "no checksum"} else _BAD)
        table.add_row(Text(printable(shard.name)), format_nbytes(shard.nbytes), state)
    console.print(table)
    if len(report.shards) > _MAX_ROWS:
        console.print(f"and {len(report.shards) - _MAX_ROWS} more files")
    if report.inputs:
        console.print()
        table = make_table("input", "files", left=("input", "files"))
        for each in report.inputs:
            state = Text(each.state, style=_BAD if each.state == "changed" else "")
            table.add_row(Text(printable(each.path)), state)
        console.print(table)

    console.print()
    recomputed = f"{report.num_recomputed} of {report.num_tensors} tensors"
    if report.num_recomputed:
        recomputed += f", {format_count(report.numel_recomputed)} elements"
    facts = make_table("", "", left=("", ""))
    facts.show_header = False
    facts.add_row(Text("checksums"), Text(format_nbytes(report.nbytes_checked)))
    facts.add_row(Text("recomputed"), Text(recomputed))
    facts.add_row(Text("time"), Text(format_seconds(report.seconds)))
    console.print(facts)

    for note in report.notes:
        console.print()
        console.print(Text.assemble(("note: ", "bold"), printable(note)), soft_wrap=not console.is_terminal)
    for problem in report.problems[:_MAX_ROWS]:
        console.print()
        console.print(Text.assemble(("problem: ", _BAD), printable(problem)), soft_wrap=not console.is_terminal)
    if len(report.problems) > _MAX_ROWS:
        console.print(f"and {len(report.problems) - _MAX_ROWS} more problems")
    console.print()
    if report.ok:
        console.print(f"{printable(report.out)}: nothing wrong was found")
    else:
        count = len(report.problems)
        verdict = f"{printable(report.out)}: {count} problem{'s' if count > 1 else ''}"
        console.print(Text(verdict, style=_BAD))
