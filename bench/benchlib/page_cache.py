"""The page cache before commands are timed: the files in it or out of it, and what was found there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metagpt_fast.page_cache import evict, fill, percent_cached


class CacheState:
    """Brings files into the page cache or out of it before commands are timed, and remembers how much was cached then.

    Args:
        paths: the files.

    Attributes:
        percents: of the files' pages, one number per call; clear it for a new series.
    """

    _MIN_PERCENT_WARM = 99.0

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.percents: list[float] = []

    @property
    def is_warm(self) -> bool:
        """Return whether the files were cached each time."""
        return min(self.percents) >= self._MIN_PERCENT_WARM

    def warm_up(self) -> None:
        """Read the files, unless they are cached."""
        if percent_cached(self._paths) < self._MIN_PERCENT_WARM:
            fill(self._paths)
        self.percents.append(percent_cached(self._paths))

    def cool_down(self) -> None:
        """Evict the files."""
        evict(self._paths)
        self.percents.append(percent_cached(self._paths))
