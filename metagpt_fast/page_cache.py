"""The page cache: what part of files it holds, filling it, emptying it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

_READ_NBYTES = 8 << 20


def percent_cached(paths: Iterable[Path]) -> float:
    """Return how many percent of the files' pages are in memory, as mincore tells.

    A process that may not write a file is told that all of it is cached, so a figure is refused rather than wrong.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    num_pages = num_cached = 0
    for path in paths:
        nbytes = path.stat().st_size
        if nbytes == 0:
            continue
        pages = -(-nbytes // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        with path.open("rb") as file:
            # Copy-on-write, because ctypes takes addresses of writable buffers only; no page is touched.
            mapping = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
            anchor = ctypes.c_ubyte.from_buffer(mapping)
            status = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(nbytes), vector)
            number = ctypes.get_errno()
            del anchor
            mapping.close()
        if status != 0:
            raise OSError(number, os.strerror(number), str(path))
        num_pages += pages
        num_cached += bytes(vector).translate(_LOWEST_BIT).count(1)
    return 100.0 * num_cached / num_pages if num_pages else 0.0


# mincore sets the lowest bit; the others are reserved.
_LOWEST_BIT = bytes(value & 1 for value in range(256))


def evict(paths: Iterable[Path]) -> None:
    """Take the files out of the page cache, after writing what is not on the disk yet."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(paths: Iterable[Path], advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Read the files in order, so that they are in the page cache if it is large enough.

    ``advance`` is called with the bytes of each read.
    """
    buffer = bytearray(_READ_NBYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while nbytes := file.readinto(buffer):
                advance(nbytes)
