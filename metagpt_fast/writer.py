"""Crash-safe output: files under a temporary name, filled by the kernels, renamed when all are whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import OutputError
from .output_shards import OutputShard, OutputTensor, index_file_name, index_json, plan_shards
from .output_target import (
    check_replaceable,
    check_target,
    free_nbytes,
    is_file_target,
    os_errors,
    publish_file,
    publish_folder,
    real_target,
    side_file,
)
from .quantities import format_nbytes

__all__ = [
    "CheckpointWriter",
    "OutputShard",
    "OutputSlot",
    "OutputTensor",
    "check_target",
    "is_file_target",
    "plan_shards",
]

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """Where one tensor of the output is written.

    Attributes:
        fd: descriptor of the file, open for reading and writing until ``finish``.
        data_offset: where the tensor begins, in bytes from the start of the file.
        path: the file under its temporary name.
    """

    fd: int
    data_offset: int
    path: Path


class CheckpointWriter:
    """Writes one checkpoint; use it in a ``with`` block and call ``finish`` at its end.

    Leaving the block without ``finish``, by an exception or not, removes everything that was written. At that
    point no thread may write to a slot any more: its descriptor is closed and may become another file's.

    Args:
        target: the output folder, or a file if the name ends in ``.safetensors`` (then exactly one shard).
        shards: the files, as ``plan_shards`` returns them.
        overwrite: replace a model that is already there, once the new one is whole.
    """

    def __init__(self, target: Path, shards: Sequence[OutputShard], *, overwrite: bool = False) -> None:
        if is_file_target(target) and len(shards) != 1:
            raise ValueError(f"{target} is one file, but {len(shards)} shards were given")
        self._target = real_target(target)
        self._shards = tuple(shards)
        self._overwrite = overwrite
        self._staging = self._target.with_name(f".{self._target.name}.partial-{secrets.token_hex(4)}")
        self._fds: list[int] = []
        self._slots: dict[str, OutputSlot] = {}

    def __enter__(self) -> CheckpointWriter:
        """Reserve the space of all shards and write their headers.

        Raises:
            OutputError: the target may not be replaced, or the files cannot be made at their full size.
        """
        with os_errors(self._target, "cannot create the output"):
            check_replaceable(self._target, overwrite=self._overwrite)
            free = free_nbytes(self._target.parent)
            self._staging.mkdir()
            try:
                for shard in self._shards:
                    self._create(shard, free)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not finished."""
        self._discard()

    def slot(self, tensor_name: str) -> OutputSlot:
        """Return where the bytes of ``tensor_name`` go; those that are never written read as zeros."""
        return self._slots[tensor_name]

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write an extra file into the output, or beside it as ``{stem}.{name}`` if the output is one file.

        Args:
            name: path within the output folder, such as ``config.json``; a missing subfolder is made.
            content: the bytes, or a file to copy.

        Raises:
            OutputError: the file cannot be read or written, or the output already has one of this name.
        """
        path = self._staging / name
        if is_file_target(self._target):
            path = self._staging / side_file(self._target, name).name
        with os_errors(self._target, f"cannot write {name} into the output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file)

    def finish(self) -> None:
        """Write the index, close all files, and give the output its name: only now it looks like a model.

        Raises:
            OutputError: one of these steps failed; an old output is still, or again, in its place.
        """
        if len(self._shards) > 1:
            self.add_file(index_file_name(self._shards), index_json(self._shards))
        with os_errors(self._target, "cannot close the output's files"):
            self._close()
        publish = publish_file if is_file_target(self._target) else publish_folder
        publish(self._staging, self._target, overwrite=self._overwrite)

    def _create(self, shard: OutputShard, free: int | None) -> None:
        path = self._staging / (self._target.name if is_file_target(self._target) else shard.file_name)
        # The mode is narrowed by the umask, as for any file the user makes.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        try:
            _reserve(fd, shard.nbytes)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise OutputError(
                f"cannot reserve the space of the output ({error.strerror})",
                where=self._target.parent,
                got="an unknown number of bytes free" if free is None else f"{format_nbytes(free)} free",
                expected=format_nbytes(sum(shard.nbytes for shard in self._shards)),
                hint="free some space (or quota), or choose another disk with -o",
            ) from error
        _pwrite_all(fd, shard.header)
        for name, data_offset in shard.data_offsets.items():
            self._slots[name] = OutputSlot(fd, data_offset, path)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _discard(self) -> None:
        """Close and remove what is left of the staging folder: nothing, after ``finish``."""
        while self._fds:
            try:
                self._close()
            except OSError:
                continue  # the file is about to be deleted; the descriptor is gone in any case
        shutil.rmtree(self._staging, ignore_errors=True)


def _reserve(fd: int, nbytes: int) -> None:
    """Give the file its full size, with space on the disk where the file system can promise it."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, nbytes)


def _pwrite_all(fd: int, content: bytes) -> None:
    """Write all of ``content`` to the start of the file; one call may write less than it was asked to."""
    num_written = 0
    while num_written < len(content):
        num_written += os.pwrite(fd, content[num_written:], num_written)
