"""Sizes, rates and times as people write them: text to bytes, and numbers to text.

Units with an ``i`` or with one letter are powers of 1024 (``1GiB``, ``512M``, as in dd and Docker); units
that end in a plain ``B`` are powers of 1000 (``5GB``, as disk makers and ``max_shard_size`` elsewhere count).
Everything printed is in powers of 1000.
"""

from __future__ import annotations

import re

from .errors import RecipeError

_LETTERS = "kmgt"
_UNIT_NBYTES: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate(_LETTERS, start=1):
    _UNIT_NBYTES[_letter] = _UNIT_NBYTES[f"{_letter}i"] = _UNIT_NBYTES[f"{_letter}ib"] = 1024**_power
    _UNIT_NBYTES[f"{_letter}b"] = 1000**_power

# Eighteen digits keep the number within what files and processes can address on any system.
_SIZE = re.compile(r"\s*([0-9]{1,18})(\.[0-9]{1,18})?\s*([a-zA-Z]*)\s*")
_MAX_NBYTES = 2**63 - 1


def parse_nbytes(value: str | int, *, where: str = "size") -> int:
    """Return the number of bytes that ``value`` means, at least 1.

    Args:
        value: a number of bytes, or text such as ``"1GiB"``, ``"5GB"``, ``"512M"``, ``"1.5 GB"`` (any case).
        where: the name of the option or argument, for the error message.

    Raises:
        RecipeError: the text is no size, or the size is below one byte or above 2**63 - 1.
    """
    nbytes = value if isinstance(value, int) else _parse_text(value)
    if nbytes is None or not 1 <= nbytes <= _MAX_NBYTES:
        raise RecipeError(
            "this is not a size",
            where=where,
            got=repr(value),
            expected="a number of bytes above 0, or a number with a unit, such as 512MiB, 1GiB or 5GB",
        )
    return nbytes


def _parse_text(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    whole, fraction, unit = match.groups()
    unit_nbytes = _UNIT_NBYTES.get(unit.lower())
    if unit_nbytes is None:
        return None
    nbytes = int(whole) * unit_nbytes
    return nbytes if fraction is None else nbytes + int(float(fraction) * unit_nbytes)


def format_nbytes(nbytes: float) -> str:
    """Return ``nbytes`` with three digits and a unit of 1000s: ``2.20 GB``, ``168 MB``, ``12 B``."""
    return _with_prefix(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(count: float) -> str:
    """Return a number of parameters with three digits: ``1.10 B`` (billions), ``75.1 M``, ``512``."""
    return _with_prefix(count, ("", "k", "M", "B", "T")).rstrip()


def format_norm(norm: float) -> str:
    """Return four digits: ``8.661``, ``0.04210``, ``8657``."""
    return f"{norm:#.4g}".removesuffix(".")


def format_rate(nbytes: float, seconds: float) -> str:
    """Return the throughput of ``nbytes`` in ``seconds``: ``12.7 GB/s``; a dash where no time passed."""
    return f"{format_nbytes(nbytes / seconds)}/s" if seconds > 0 else "–"


def format_seconds(seconds: float) -> str:
    """Return a duration as a person says it: ``812 ms``, ``1.74 s``, ``2 min 05 s``, ``1 h 03 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _with_prefix(value: float, units: tuple[str, ...]) -> str:
    """Three digits and the unit; a value that would round to 1000 moves to the next unit."""
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    if index == 0:
        return f"{value:.0f} {units[0]}"
    num_decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{num_decimals}f} {units[index]}"
