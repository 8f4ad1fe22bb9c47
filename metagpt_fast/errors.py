"""The errors a user can meet: one message that says where, what, got, expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class MetagptFastError(Exception):
    """Base of every error this package raises on purpose.

    The message reads ``where: what: got X, expected Y; hint``; parts that were not given are left out.
    The command line prints it as one line and exits with status 1.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        got: object | None = None,
        expected: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.where = None if where is None else str(where)
        self.what = what
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        super().__init__(self._message())

    def add_hint(self, hint: str) -> None:
        """Add to what the user can do."""
        self.hint = hint if self.hint is None else f"{self.hint}; {hint}"
        self.args = (self._message(),)

    def _message(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        facts = []
        if self.got is not None:
            facts.append(f"got {self.got}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if facts:
            text += ": " + ", ".join(facts)
        if self.hint is not None:
            text += f"; {self.hint}"
        return text

    def to_dict(self) -> dict[str, str | None]:
        """Return the parts of the message by name, for ``--json``."""
        return {
            "error": type(self).__name__,
            "message": str(self),
            "where": self.where,
            "what": self.what,
            "got": self.got,
            "expected": self.expected,
            "hint": self.hint,
        }


class CheckpointError(MetagptFastError):
    """A checkpoint cannot be read, or its files contradict themselves."""


class RecipeError(MetagptFastError):
    """A method, parameter or option has a value that cannot be used."""


class PlanError(MetagptFastError):
    """The checkpoints cannot be merged with each other."""


class MeasurementError(MetagptFastError):
    """A saved measurement is broken, or belongs to other checkpoints."""


class DataError(MetagptFastError):
    """The weights themselves cannot be merged (NaN, Inf, nothing to merge)."""


class OutputError(MetagptFastError):
    """The output cannot be written."""


class BackendError(MetagptFastError):
    """A backend, device or instruction set that was asked for cannot be used."""


class IntegrationError(MetagptFastError):
    """Another merge tool is missing, or is not of a version that this package works with."""


def suggestion(name: str, allowed: Iterable[str]) -> str | None:
    """Return ``did you mean X?`` for the allowed name that is most like ``name``, or None if none is like it."""
    import difflib

    # Comparing takes the product of both lengths: nothing this long is a slip of the keyboard.
    close = difflib.get_close_matches(name, allowed, n=1) if len(name) <= 64 else []
    return f"did you mean {close[0]}?" if close else None
