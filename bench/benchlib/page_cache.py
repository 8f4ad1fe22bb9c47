"""The page cache: what part of files it holds, filling it, emptying it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
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


def fill(paths: Iterable[Path]) -> None:
    """Read the files, so that they are in the page cache if it is large enough."""
    buffer = bytearray(_READ_NBYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


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
