"""The shards of base and models while they are read: mapped, or read through bounded buffers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from . import _native
from .backends.tables import MEMORY, Place
from .checkpoint import ShardFile, TensorSource
from .checksums import file_crc32c, join_crc32c
from .errors import CheckpointError, RecipeError
from .untrusted import read_at, unreadable

IO_CHOICES = ("auto", "mmap", "pread")

# Page faults on these go over a network or through a user-space daemon, one page at a time; a daemon or server that
# goes away turns a fault into SIGBUS.
_PREAD_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "virtiofs"})
_PREFETCH_CHUNK_NBYTES = 4 << 20
_COPY_CHUNK_NBYTES = 8 << 20
_CHECKED_COPY_NBYTES = 64 << 20

# A part of a file: path, first byte, number of bytes.
FileRange = tuple[Path, int, int]


def check_io(io: str) -> str:
    """Return the way to read if there is such a one; raises RecipeError if not."""
    if io not in IO_CHOICES:
        raise RecipeError("unknown way to read", where="io", got=repr(io), expected=", ".join(IO_CHOICES))
    return io


class InputFiles:
    """Open input shards by path; use it in a ``with`` block.

    Args:
        shards: what ``open_checkpoint`` has validated.
        io: ``mmap``, ``pread``, or ``auto`` (pread if any shard is on a network or FUSE file system).
    """

    def __init__(self, shards: Iterable[ShardFile], io: str = "auto") -> None:
        self._shards = {shard.path: shard for shard in shards}
        self.io = _choose_io(list(self._shards)) if io == "auto" else io
        check_io(self.io)
        self._files: dict[Path, _InputFile] = {}
        self._prefetcher = _Background()
        self._prefetch_buffer = memoryview(bytearray(_PREFETCH_CHUNK_NBYTES))

    def __enter__(self) -> InputFiles:
        _allow_open_files(2 * len(self._shards) + 256)
        try:
            for path, shard in self._shards.items():
                self._files[path] = _InputFile(shard, is_mapped=self.io == "mmap")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def place(self, source: TensorSource, first: int, *, is_mapped: bool = True) -> Place:
        """Return where element ``first`` of a tensor of a mergeable dtype is, as the backends take it.

        In memory if the file is mapped, unless ``is_mapped`` is False: then the kernels read it through buffers.
        """
        file = self._files[source.path]
        offset = source.data_offset + first * source.dtype.itemsize
        code = source.dtype.code
        assert code is not None  # the plan lets only mergeable dtypes come here
        return (file.address + offset, MEMORY, code) if file.is_mapped and is_mapped else (offset, file.fd, code)

    def prefetch(self, ranges: Sequence[FileRange]) -> None:
        """Start reading these parts into the page cache, in the background; those already there cost nothing."""
        self._prefetcher.call(lambda: self._read_ahead(ranges))

    def release(self, ranges: Sequence[FileRange]) -> None:
        """Take these parts out of this process's memory. They stay in the page cache as long as there is room."""
        with contextlib.suppress(OSError):  # advice only
            for path, offset, nbytes in ranges:
                self._files[path].release(offset, nbytes)

    def copy(self, source: TensorSource, out_fd: int, out_offset: int) -> int:
        """Copy a tensor's bytes into an open file; file systems with reflinks share the blocks instead.

        Returns:
            Their CRC32C.

        Raises:
            CheckpointError: the file has become too short, or a read failed.
            OSError: a write failed.
        """
        fd = self._files[source.path].fd
        crcs, sizes = [], []
        # What is copied has just been read, and the kernel takes it from the page cache.
        for first in range(0, source.nbytes, _CHECKED_COPY_NBYTES):
            offset, nbytes = source.data_offset + first, min(_CHECKED_COPY_NBYTES, source.nbytes - first)
            try:
                crcs.append(file_crc32c(fd, offset, nbytes))
                copy_range(fd, offset, out_fd, out_offset + first, nbytes)
            except OSError:
                self.read(source, first, nbytes)  # raises if it is the input that fails
                raise
            sizes.append(nbytes)
        return join_crc32c(crcs, sizes)

    def read(self, source: TensorSource, first_byte: int, nbytes: int) -> bytes:
        """Return bytes of a tensor; raises CheckpointError if the file has become too short, or a read fails."""
        try:
            content = read_at(self._files[source.path].fd, nbytes, source.data_offset + first_byte)
        except OSError as error:
            raise unreadable(source.path, error) from error
        if len(content) < nbytes:
            raise _truncated(source.path)
        return content

    def check(self) -> None:
        """Raise CheckpointError if a page of a mapped file could not be read: then kernels have seen zeros instead."""
        for path, file in self._files.items():
            offset = file.fault_offset
            if offset < 0:
                continue
            if os.fstat(file.fd).st_size <= offset:
                raise _truncated(path)
            raise CheckpointError(
                "cannot be read: its disk has failed",
                where=path,
                got=f"an error at byte {offset}",
                hint="look at the system's log, and copy the file from elsewhere",
            )

    def check_sizes(self) -> None:
        """Raise CheckpointError if a file has become shorter: no disk has failed, and nothing will mend it."""
        for path, file in self._files.items():
            if os.fstat(file.fd).st_size < self._shards[path].nbytes:
                raise _truncated(path)

    def _read_ahead(self, ranges: Sequence[FileRange]) -> None:
        for path, offset, nbytes in ranges:
            for start in range(offset, offset + nbytes, _PREFETCH_CHUNK_NBYTES):
                if self._prefetcher.is_closing:
                    return
                size = min(_PREFETCH_CHUNK_NBYTES, offset + nbytes - start)
                _read_ahead(self._files[path].fd, start, self._prefetch_buffer[:size])

    def _close(self) -> None:
        self._prefetcher.close()
        for file in self._files.values():
            file.close()
        self._files.clear()


class _InputFile:
    """One shard: a descriptor, and the address of its mapping if it is mapped."""

    def __init__(self, shard: ShardFile, *, is_mapped: bool) -> None:
        self.is_mapped = is_mapped
        self.address = 0
        self._map: mmap.mmap | None = None
        self._guard = -1
        self.fd = -1
        try:
            self.fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            info = os.fstat(self.fd)
            self._nbytes = info.st_size
            # The header's offsets are those of the file that was validated, and of no other.
            if (info.st_size, info.st_mtime_ns) != (shard.nbytes, shard.mtime_ns):
                raise CheckpointError(
                    "file has changed since it was opened", where=shard.path, hint="run the command again"
                )
            if is_mapped:
                self._map = mmap.mmap(self.fd, self._nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                self.address = np.frombuffer(self._map, np.uint8).ctypes.data
                self._guard = _native.guard_mapping(self.address, self._nbytes)
        except BaseException as error:
            self.close()
            if not isinstance(error, (OSError, ValueError)):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            hint = "try --io pread" if is_mapped and not isinstance(error, PermissionError) else None
            raise CheckpointError(f"cannot open the file ({reason})", where=shard.path, hint=hint) from error

    @property
    def fault_offset(self) -> int:
        """Return where the first page begins that could not be read through the mapping, or -1."""
        return _native.fault_offset(self._guard) if self._guard >= 0 else -1

    def release(self, offset: int, nbytes: int) -> None:
        if self._map is None or nbytes == 0:
            return
        # Outwards to whole pages: a page shared with a neighbour is mapped again at its next use.
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + nbytes, self._nbytes)
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        if self._guard >= 0:
            _native.unguard_mapping(self._guard)
            self._guard = -1
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Background:
    """A thread that carries out calls in order; starts at the first call. What it calls must not raise."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.is_closing = False

    def call(self, function: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="metagpt_fast-prefetch", daemon=True)
            self._thread.start()
        self._queue.put(function)

    def close(self) -> None:
        """Skip what has not begun, and wait for what has."""
        if self._thread is not None:
            self.is_closing = True
            self._queue.put(None)
            with contextlib.suppress(RuntimeError):  # a signal came before it was started
                self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            if not self.is_closing:
                function()


def _read_ahead(fd: int, offset: int, buffer: memoryview) -> None:
    """Bring a part of a file into the page cache, unless it is there: as many bytes as ``buffer`` has."""
    try:
        if os.preadv(fd, [buffer[:1]], offset, os.RWF_NOWAIT):
            return
    except BlockingIOError:
        # Reading, into a buffer that nobody looks at, and not POSIX_FADV_WILLNEED: the kernel then caches in large
        # folios, not page by page. As fast from the disk, and mapping the data afterwards costs 0.02 s of CPU for
        # 4.4 GB instead of 0.46 s, each time (ext4, Linux 6.18).
        with contextlib.suppress(OSError):  # the reader itself will meet the error, and report it
            os.preadv(fd, [buffer], offset)
    except OSError:  # a file system that cannot tell: reading would copy everything that is cached already
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_WILLNEED)


def copy_range(in_fd: int, in_offset: int, out_fd: int, out_offset: int, nbytes: int) -> None:
    """Copy bytes between open files at given offsets; raises OSError, also if the input ends early."""
    done = 0
    use_buffer = False
    while done < nbytes:
        count = min(_COPY_CHUNK_NBYTES, nbytes - done)
        if not use_buffer:
            try:
                copied = os.copy_file_range(in_fd, out_fd, count, in_offset + done, out_offset + done)
            except OSError as error:
                if error.errno not in {
                    errno.EXDEV,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                    errno.EBADF,
                }:
                    raise
                use_buffer = True
                continue
            if copied == 0:  # also what some special file systems answer
                use_buffer = True
            done += copied
            continue
        content = os.pread(in_fd, count, in_offset + done)
        if not content:
            raise OSError(errno.EIO, "the input file ended early")
        done += os.pwrite(out_fd, content, out_offset + done)


def _truncated(path: Path) -> CheckpointError:
    return CheckpointError(
        "the file was truncated while it was read", where=path, hint="something else writes to it: a download, a sync"
    )


def _choose_io(paths: Sequence[Path]) -> str:
    mounts = _mounts()
    for folder in {path.resolve().parent for path in paths}:
        kind = next((kind for point, kind in mounts if folder.is_relative_to(point)), "")
        if kind in _PREAD_FILE_SYSTEMS or kind.startswith("fuse"):
            return "pread"
    return "mmap"


def _mounts() -> list[tuple[Path, str]]:
    """Return mount points and their file systems, longest path first; nothing where /proc is missing."""
    try:
        text = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    mounts = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3:
            mounts.append((Path(fields[1].replace("\\040", " ").replace("\\011", "\t")), fields[2]))
    return sorted(mounts, key=lambda mount: len(mount[0].parts), reverse=True)


def _allow_open_files(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
