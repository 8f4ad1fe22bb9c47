"""CRC32C of an output's files: known tensor by tensor when all is written, and found again by reading a file once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import _native
from .output_shards import OutputShard

# What is read between two reports of progress.
_WINDOW_NBYTES = 64 << 20


def join_crc32c(crcs: Sequence[int], nbytes: Sequence[int]) -> int:
    """Return the CRC32C of parts that follow one another, from their CRC32C and sizes."""
    owners = np.zeros(len(crcs), np.int64)
    return int(_native.crc32c_join(np.array(crcs, np.uint32), np.array(nbytes, np.int64), owners, 1)[0])


def file_crc32c(fd: int, offset: int, nbytes: int) -> int:
    """Return the CRC32C of a part of an open file, read by all threads; raises OSError, also if the file ends early."""
    return int(_native.crc32c_of_file(fd, np.array([offset], np.int64), np.array([nbytes], np.int64))[0])


def consecutive_crc32c(fd: int, sizes: Sequence[int], advance: Callable[[int], None]) -> list[int]:
    """Return the CRC32C of each of the parts that an open file consists of, in order.

    Args:
        fd: the file; read once, by all threads.
        sizes: the parts' sizes, in bytes.
        advance: is told about every few MiB that are done.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    crcs, nbytes, owners = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for window in _windows(sizes):
        window_owners, offsets, window_nbytes = np.array(window, np.int64).T.copy()
        crcs.append(_native.crc32c_of_file(fd, offsets, window_nbytes))
        nbytes.append(window_nbytes)
        owners.append(window_owners)
        advance(int(window_nbytes.sum()))
    parts = np.concatenate(crcs), np.concatenate(nbytes), np.concatenate(owners)
    found: list[int] = _native.crc32c_join(*parts, len(sizes)).tolist()
    return found


def _windows(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield lists of (part, offset, nbytes) that cover everything, each list about a window in all."""
    window: list[tuple[int, int, int]] = []
    room, offset = _WINDOW_NBYTES, 0
    for part, size in enumerate(sizes):
        left = size
        while left > 0:
            count = min(left, room)
            window.append((part, offset, count))
            room, offset, left = room - count, offset + count, left - count
            if room == 0:
                yield window
                window, room = [], _WINDOW_NBYTES
    if window:
        yield window


class OutputChecksums:
    """The CRC32C of the tensors of an output while it is written; pieces of a tensor may come in any order.

    Args:
        shards: the output's files.
    """

    def __init__(self, shards: Sequence[OutputShard]) -> None:
        self._shards = shards
        self._nbytes = {tensor.name: tensor.nbytes for shard in shards for tensor in shard.tensors}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # (first byte, bytes, CRC)
        self._crcs = {name: 0 for name, nbytes in self._nbytes.items() if nbytes == 0}

    def add(self, name: str, first_byte: int, nbytes: int, crc: int) -> None:
        """Note the CRC32C of a piece of a tensor."""
        if nbytes:
            self._pieces.setdefault(name, []).append((first_byte, nbytes, crc))

    def complete(self, names: Sequence[str]) -> dict[str, str]:
        """Return the CRC32C of these tensors, of which all pieces are there, as 8 hexadecimal digits.

        Raises:
            ValueError: the pieces do not make up the tensor, each byte once.
        """
        for name in names:
            self._complete(name)
        return {name: _hexadecimal(self._crcs[name]) for name in names}

    def restore(self, crcs: Mapping[str, str]) -> None:
        """Take over what ``complete`` has returned in another process."""
        self._crcs.update({name: int(crc, 16) for name, crc in crcs.items()})

    def record(self) -> dict[str, Any]:
        """Return what ``metagpt_fast.json`` says under ``output``, when all tensors are written.

        Raises:
            ValueError: a tensor is not, or not all of it.
        """
        return {"shards": [self._shard_record(shard) for shard in self._shards]}

    def _shard_record(self, shard: OutputShard) -> dict[str, Any]:
        names = [tensor.name for tensor in shard.tensors]
        crcs = self.complete(names)
        parts = [_native.crc32c(shard.header), *(self._crcs[name] for name in names)]
        crc = join_crc32c(parts, [len(shard.header), *(self._nbytes[name] for name in names)])
        return {
            "name": shard.file_name,
            "nbytes": shard.nbytes,
            "crc32c": _hexadecimal(crc),
            "tensors": [{"name": name, "nbytes": self._nbytes[name], "crc32c": crcs[name]} for name in names],
        }

    def _complete(self, name: str) -> None:
        pieces = sorted(self._pieces.pop(name, ()))
        if not pieces and name in self._crcs:
            return
        end = 0
        for first_byte, nbytes, _ in pieces:
            if first_byte != end:
                break
            end += nbytes
        if end != self._nbytes[name] or end != sum(nbytes for _, nbytes, _ in pieces):
            raise ValueError(f"tensor {name!r}: what was written does not make up its {self._nbytes[name]} bytes")
        self._crcs[name] = join_crc32c([crc for _, _, crc in pieces], [nbytes for _, nbytes, _ in pieces])


def _hexadecimal(crc: int) -> str:
    return f"{crc:08x}"
