"""What ``metagpt-fast methods`` and the dry run of a recipe print: methods, and tensors with theirs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .console import open_console
from .methods import changed_parameters
from .table_parts import make_table, settings
from .untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

    from .plan import MergePlan


def print_methods(methods: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print a line per method: its name and what it computes."""
    console = open_console() if console is None else console
    table = make_table("method", "computes", left=("method", "computes"))
    for method in methods:
        table.add_row(method["name"], Text(method["equation"]))
    console.print(table)
    console.print()
    console.print("metagpt-fast methods NAME explains one of them", style="dim")


def print_method(method: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a method: what it computes, where it comes from, its parameters."""
    console = open_console() if console is None else console
    console.print(Text(method["name"], style="bold"))
    # The lines of a paragraph are the source's; those of the output are the terminal's.
    paragraphs = method["description"].replace("``", "").split("\n\n")
    filled = (textwrap.fill(" ".join(lines.split()), console.width - 2) for lines in paragraphs)
    console.print(Text(textwrap.indent("\n\n".join(filled), "  ")))
    console.print()
    if not method["parameters"]:
        console.print("no parameters")
        return
    table = make_table("parameter", "default", "values", "meaning", left=("parameter", "default", "values", "meaning"))
    for parameter in method["parameters"]:
        table.add_row(parameter["name"], _default(parameter["default"]), _values(parameter), Text(parameter["meaning"]))
    console.print(table)


def print_tensors(plan: MergePlan, console: Console) -> None:
    """Print a line per tensor of the output: what it is made of, and parameters that differ from the defaults."""
    table = make_table("tensor", "shape", "dtype", "from", "parameters", left=("tensor", "dtype", "from", "parameters"))
    for tensor in plan.tensors:
        names = [plan.labels[column] for column in tensor.columns]
        if tensor.base is not None:
            names.insert(0, "base")
        sources = [
            name if source.name == tensor.name else f"{name}:{source.name}"
            for name, source in zip(names, tensor.sources, strict=True)
        ]
        parameters = "copied"
        if tensor.method is not None:
            changed = changed_parameters(tensor.method.name, tensor.method.parameters())
            parameters = ", ".join([tensor.method.name, *settings(changed)])
        table.add_row(
            Text(printable(tensor.name)),
            "×".join(map(str, tensor.shape)) or "scalar",
            tensor.out_dtype.name,
            Text(printable(", ".join(sources))),
            parameters,
        )
    console.print(table)


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(parameter: Mapping[str, Any]) -> str:
    kinds = {"float": "number", "int": "whole number", "bool": "true, false", "str": ", ".join(parameter["choices"])}
    kind = kinds[parameter["type"]]
    return f"{kind}, or one per model" if parameter["per_model"] else kind
