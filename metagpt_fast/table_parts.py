"""Parts that the tables on the terminal are made of."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text


def make_table(*columns: str, left: tuple[str, ...]) -> Table:
    """Return an empty table without lines; columns that are not in ``left`` are numbers, aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        is_left = column in left
        table.add_column(Text(column), justify="left" if is_left else "right", overflow="fold")
    return table


def settings(parameters: Mapping[str, object]) -> list[str]:
    """Return parameters as people read them, one text each."""
    return [f"{name} {_setting(value)}" for name, value in parameters.items() if value is not None]


def _setting(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
