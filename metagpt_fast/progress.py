"""How far a long pass over the weights has come: bars on a terminal, plain lines everywhere else.

Both classes have what ``merge(progress=...)`` calls: ``start(phase, total_nbytes)``, ``advance(nbytes)`` and
``finish()``. Leaving the ``with`` block puts the terminal back in order, also after an error or Ctrl-C.
Progress goes to stderr, so that stdout carries results only.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

from .quantities import format_nbytes, format_rate, format_seconds

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0


def open_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """Return the progress display that suits ``stream`` (default stderr), or a silent one for ``quiet``."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Progress()
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return BarProgress(stream)
    return LineProgress(stream)


class Progress:
    """Shows nothing; the other displays derive from it."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def start(self, phase: str, total_nbytes: int) -> None:
        """Begin a phase that will go over ``total_nbytes`` bytes of input."""

    def advance(self, nbytes: int) -> None:
        """Add ``nbytes`` to what the phase has done."""

    def finish(self) -> None:
        """End the phase."""


class LineProgress(Progress):
    """One line every few seconds and one at the end of each phase, for logs and pipes.

    A closed or full stream ends the lines, never the merge.
    """

    def __init__(self, stream: TextIO, *, seconds_between_lines: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream: TextIO | None = stream
        self._interval = seconds_between_lines
        self._phase = ""
        self._total_nbytes = 0
        self._done_nbytes = 0
        self._started = 0.0
        self._next_line = 0.0

    def start(self, phase: str, total_nbytes: int) -> None:
        """Begin a phase; the first line comes after one interval."""
        self._phase, self._total_nbytes, self._done_nbytes = phase, total_nbytes, 0
        self._started = time.monotonic()
        self._next_line = self._started + self._interval

    def advance(self, nbytes: int) -> None:
        """Add ``nbytes``, and write a line if one is due."""
        self._done_nbytes += nbytes
        now = time.monotonic()
        if now < self._next_line or not 0 < self._done_nbytes < self._total_nbytes:
            return
        self._next_line = now + self._interval
        seconds = now - self._started
        left = seconds * (self._total_nbytes - self._done_nbytes) / self._done_nbytes
        percent = int(100 * self._done_nbytes / self._total_nbytes)  # rounds down: 100 % means done
        self._write(
            f"{self._phase}: {percent} %, {format_nbytes(self._done_nbytes)} of "
            f"{format_nbytes(self._total_nbytes)}, {format_rate(self._done_nbytes, seconds)}, "
            f"{format_seconds(left)} left"
        )

    def finish(self) -> None:
        """Write the phase's last line: bytes, time and throughput."""
        seconds = time.monotonic() - self._started
        self._write(
            f"{self._phase}: {format_nbytes(self._done_nbytes)} in {format_seconds(seconds)}, "
            f"{format_rate(self._done_nbytes, seconds)}"
        )

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None


class BarProgress(Progress):
    """One bar per phase: percent, bytes done and all, bytes per second, time left (in the end: taken)."""

    def __init__(self, stream: TextIO, *, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(file=stream) if console is None else console,
        )
        self._task: TaskID | None = None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, phase: str, total_nbytes: int) -> None:
        """Add a bar for the phase; the first one takes hold of the terminal."""
        self._progress.start()
        self._task = self._progress.add_task(phase, total=total_nbytes)

    def advance(self, nbytes: int) -> None:
        """Move the bar; the screen is redrawn at rich's own pace, about ten times a second."""
        if self._task is not None:
            self._progress.advance(self._task, nbytes)

    def finish(self) -> None:
        """Leave the phase's bar as it is; the next phase's comes below it."""
        self._task = None
