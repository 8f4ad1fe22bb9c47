"""Ways to read and write files by several threads: mapped, through buffers, past the page cache (O_DIRECT)."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metagpt_fast import _native
from metagpt_fast.benchmarking.files import WRITE_NBYTES, incompressible, new_file, write_items

BUFFER_NBYTES = WRITE_NBYTES
"""What a kernel's thread reads of one operand at a time with ``--io pread``, in bf16; and writes."""
DIRECT_NBYTES = 4 << 20
"""O_DIRECT has no read-ahead, so it needs more at a time."""
CEILING_THREADS = 8
"""Transfers under way at once when the disk's own speed is measured."""


def supports_direct(folder: Path) -> bool:
    """Return whether the folder's file system knows O_DIRECT."""
    path = folder / "direct-probe"
    try:
        with new_file(path, 4096, os.O_DIRECT) as fd:
            os.pwrite(fd, incompressible(4096), 0)
    except OSError:
        return False
    return True


def read_mapped(paths: Sequence[Path]) -> int:
    """Map each file and add up all of it by the kernels' threads. Returns the bytes read."""
    done = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            # No view is kept: it would have to be gone before the mapping can be.
            _native.bandwidth_read(np.frombuffer(mapping, np.uint8).ctypes.data, len(mapping))
            done += len(mapping)
    return done


def read_buffers(paths: Sequence[Path], num_threads: int, item_nbytes: int = BUFFER_NBYTES, flags: int = 0) -> int:
    """Read files by threads, each into a buffer of its own that is overwritten. Returns the bytes read."""
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags) for path in paths]
    places = [(fd, start) for fd in fds for start in range(0, os.fstat(fd).st_size, item_nbytes)]
    numbers = itertools.count()

    def work() -> int:
        buffer = mmap.mmap(-1, item_nbytes)  # page-aligned, as O_DIRECT needs
        done = 0
        while (number := next(numbers)) < len(places):
            done += os.preadv(places[number][0], [buffer], places[number][1])
        return done

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return sum(future.result() for future in [pool.submit(work) for _ in range(num_threads)])
    finally:
        for fd in fds:
            os.close(fd)


def read_direct(paths: Sequence[Path], num_threads: int) -> int:
    """Read files past the page cache. Returns the bytes read."""
    return read_buffers(paths, num_threads, DIRECT_NBYTES, os.O_DIRECT)


class Target:
    """A new file whose space is reserved, and a way to fill it.

    Args:
        way: ``buffered``, ``mapped`` or ``direct``.
        path: the file; it is there while it is ``ready``.
        nbytes: its size, a multiple of 4096.
        num_threads: that write.
    """

    def __init__(self, way: str, path: Path, nbytes: int, num_threads: int) -> None:
        self._way, self._path, self._nbytes, self._num_threads = way, path, nbytes, num_threads
        self._content = incompressible(DIRECT_NBYTES if way == "direct" else BUFFER_NBYTES)

    @contextmanager
    def ready(self) -> Iterator[Callable[[bool], None]]:
        """Make the file, and yield what fills it: ``fill(waits)``, with or without waiting for the disk."""
        flags = os.O_DIRECT if self._way == "direct" else 0
        with new_file(self._path, self._nbytes, flags) as fd:
            yield lambda waits: self._fill(fd, waits)

    def _fill(self, fd: int, waits: bool) -> None:
        if self._way == "mapped":
            self._fill_mapped(fd)
        else:
            write_items(fd, self._nbytes, self._content, self._num_threads)
        if waits:
            os.fsync(fd)

    def _fill_mapped(self, fd: int) -> None:
        with mmap.mmap(fd, self._nbytes, flags=mmap.MAP_SHARED) as mapping:
            # In a function of its own: no view may be left when the mapping is closed.
            _copy_over(np.frombuffer(mapping, np.uint8), np.frombuffer(self._content, np.uint8), self._num_threads)


def _copy_over(target: NDArray[np.uint8], content: NDArray[np.uint8], num_threads: int) -> None:
    """Fill ``target`` with ``content``, over and over."""
    starts = itertools.count(0, content.size)

    def work() -> None:
        while (start := next(starts)) < target.size:
            part = target[start : start + content.size]
            np.copyto(part, content[: part.size])

    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(work) for _ in range(num_threads)]:
            future.result()
