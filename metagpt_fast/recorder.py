"""Makes finished tensors durable in the background, and only then says in the journal that they are done."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from .journal import Journal, Record

# Records are written this often, and whenever a file is complete: what a crash may cost. Each one waits for the disk.
RECORD_SECONDS = 2.0


class Recorder:
    """A thread that takes records in order. Several that come within a while are one record of the journal.

    Args:
        journal: where records go.
        begin: called with the names of tensors as soon as they are written; asks the disk to begin with them.
        make_durable: called with the names of tensors that are written, before their record is; may raise OSError.
        recorded: called with those names afterwards; may raise OSError.
    """

    def __init__(
        self,
        journal: Journal,
        begin: Callable[[Sequence[str]], None],
        make_durable: Callable[[Sequence[str]], None],
        recorded: Callable[[Sequence[str]], None],
    ) -> None:
        self._journal = journal
        self._begin = begin
        self._make_durable = make_durable
        self._recorded = recorded
        self._condition = threading.Condition()
        self._pending: list[tuple[Record, Sequence[str]]] = []
        self._beginning: list[str] = []
        self._is_urgent = False
        self._is_closing = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def add(self, record: Record, written: Sequence[str] = (), *, is_urgent: bool = False) -> None:
        """Note a record, and the names of the tensors that have to be on the disk before it is true.

        Raises:
            OSError: an earlier record, or its tensors, could not be written.
        """
        with self._condition:
            self._raise_error()
            self._pending.append((record, written))
            self._beginning += written
            self._is_urgent = self._is_urgent or is_urgent
            if written:
                self._condition.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="metagpt_fast-recorder", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is pending, and end the thread; raises OSError if that, or something earlier, failed."""
        self._end()
        self._raise_error()

    def stop(self) -> None:
        """End the thread without writing what is pending."""
        with self._condition:
            self._pending.clear()
            self._beginning.clear()
        self._end()

    def _end(self) -> None:
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):  # a signal came before it was started
                self._thread.join()
            self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            next_record = time.monotonic() + RECORD_SECONDS
            while True:
                with self._condition:
                    self._condition.wait_for(self._has_work, max(0.0, next_record - time.monotonic()))
                    beginning, self._beginning = self._beginning, []
                    pending: list[tuple[Record, Sequence[str]]] = []
                    if self._is_urgent or self._is_closing or time.monotonic() >= next_record:
                        pending, self._pending = self._pending, []
                        self._is_urgent = False
                        next_record = time.monotonic() + RECORD_SECONDS
                    is_last = self._is_closing
                if pending:
                    self._write(pending)
                elif beginning:
                    self._begin(beginning)
                if is_last:
                    return
        except BaseException as error:  # raised again where records are added, and at the end
            # Not tried again: a second fsync reports success for pages that the first one has given up.
            self._error = error

    def _has_work(self) -> bool:
        return bool(self._beginning) or self._is_urgent or self._is_closing

    def _write(self, pending: Sequence[tuple[Record, Sequence[str]]]) -> None:
        written = [name for _, names in pending for name in names]
        if written:
            self._make_durable(written)
        self._journal.append({"records": [record for record, _ in pending]})
        if written:
            self._recorded(written)
