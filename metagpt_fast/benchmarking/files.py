"""Writes new files as a merge does, alone and while others are read."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .. import _native

WRITE_NBYTES = 512 << 10
"""What a thread of a merge writes at a time, in bf16."""

Advance = Callable[[int], None]


def no_advance(nbytes: int) -> None:
    """Tell nobody."""


@contextmanager
def new_file(path: Path, nbytes: int, flags: int = 0) -> Iterator[int]:
    """Make a file of this size whose space is reserved, as a merge's output is; removed in the end. Yields it open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o600)
    try:
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:  # not every file system can; the writes will tell if the disk is full
            os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)
        path.unlink()


def incompressible(nbytes: int) -> memoryview:
    """Return bytes that no disk can store in less; at a page's start, as direct writes need."""
    mapping = mmap.mmap(-1, nbytes)
    mapping[:] = os.urandom(nbytes)
    return memoryview(mapping)


def write_items(fd: int, nbytes: int, content: memoryview, num_threads: int, advance: Advance = no_advance) -> None:
    """Fill a file with ``content``, over and over, by threads that take items from a queue; does not wait for the disk.

    Raises:
        OSError: a write failed.
    """
    starts = itertools.count(0, len(content))  # next() of it is one step for all threads
    stop = False

    def work() -> None:
        while not stop and (start := next(starts)) < nbytes:
            size = min(len(content), nbytes - start)
            done = 0
            while done < size:
                done += os.pwrite(fd, content[done:size], start + done)
            advance(size)

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in [pool.submit(work) for _ in range(num_threads)]:
                future.result()
        finally:
            stop = True


def write_seconds(path: Path, nbytes: int, advance: Advance = no_advance) -> tuple[float, float]:
    """Write a new file, and return the seconds until it is in the page cache, and until it is on the disk."""
    content = incompressible(WRITE_NBYTES)
    with new_file(path, nbytes) as fd:
        started = time.perf_counter()
        write_items(fd, nbytes, content, _native.num_threads(), advance)
        in_cache = time.perf_counter() - started
        os.fsync(fd)
        return in_cache, time.perf_counter() - started


def write_beside(read: Callable[[Advance], object], path: Path, nbytes: int, advance: Advance = no_advance) -> float:
    """Write a new file while ``read`` runs in another thread, and return the seconds until both are done.

    ``read`` is given what it has to tell of its progress, which raises InterruptedError if the writing failed.
    """
    stop = False

    def tell(nbytes: int) -> None:
        if stop:
            raise InterruptedError
        advance(nbytes)

    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, tell)
        try:
            write_seconds(path, nbytes, advance)
            reading.result()
        finally:
            stop = True
            with contextlib.suppress(InterruptedError):
                reading.result()
    return time.perf_counter() - started
