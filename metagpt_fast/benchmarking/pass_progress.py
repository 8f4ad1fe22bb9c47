"""Progress of merges within a phase of their own."""

from __future__ import annotations

from collections.abc import Callable

from ..progress import Progress


class PassProgress(Progress):
    """Hands on what passes over files advance, and not their phases; a merge counts its inputs twice.

    Args:
        advance: is called with bytes: when they are measured, and when they are combined.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._num_passes = 1

    def start(self, phase: str, total_nbytes: int) -> None:
        """Note whether the phase measures and combines at once."""
        self._num_passes = 2 if phase == "measure and combine" else 1

    def advance(self, nbytes: int) -> None:
        """Hand it on."""
        self._advance(self._num_passes * nbytes)
