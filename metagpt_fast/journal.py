"""A file of records that a crash can only cut short: each record proves by a checksum that it is whole.

One record is one line: a checksum, a space, a JSON object. The checksum also covers the one before it, so that a
record counts only behind all the records before it. Reading stops at the first line that is torn, and appending goes
on from there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]

_CHECKSUM_NBYTES = 16


class Journal:
    """An open journal, at the end of which records are appended.

    Args:
        path: the file; made if it does not exist, and cut behind its last whole record if it does.
        is_durable: whether a record is on the disk when ``append`` returns; else it survives the process only.

    Attributes:
        records: those that the file held when it was opened.
        num_records: how many it holds now.
        last_record: the last of them; empty if there is none.

    Raises:
        OSError: the file cannot be opened, read or cut.
    """

    def __init__(self, path: Path, *, is_durable: bool = True) -> None:
        self._is_durable = is_durable
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.records, self._nbytes, self._checksum = _parse(_read_all(self._fd))
            self.num_records = len(self.records)
            self.last_record: Record = self.records[-1] if self.records else {}
            os.ftruncate(self._fd, self._nbytes)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: Record) -> None:
        """Write a record behind the others; after an OSError it may or may not be there, and is cut off if in part."""
        payload = json.dumps(record, separators=(",", ":")).encode()
        checksum = _checksum_of(self._checksum, payload)
        line = checksum + b" " + payload + b"\n"
        try:
            write_at(self._fd, line, self._nbytes)
            if self._is_durable:
                os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._nbytes)
            raise
        self._checksum = checksum
        self._nbytes += len(line)
        self.num_records += 1
        self.last_record = record

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def read_records(path: Path) -> list[Record]:
    """Return the whole records of a journal, without changing it; none if there is no such file.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return _parse(content)[0]


def write_at(fd: int, content: bytes, offset: int) -> None:
    """Write all of ``content`` at ``offset``; one call may write less than it was asked to."""
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def pack_array(array: NDArray[Any]) -> dict[str, Any]:
    """Return an array, bit for bit, as a JSON object."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack_array(packed: dict[str, Any]) -> NDArray[Any]:
    """Return the array that ``pack_array`` packed."""
    data = base64.b64decode(packed["data"])
    array: NDArray[Any] = np.frombuffer(data, packed["dtype"], math.prod(packed["shape"])).reshape(packed["shape"])
    return array


def _parse(content: bytes) -> tuple[list[Record], int, bytes]:
    """Return the whole records, how many bytes they take, and the last checksum."""
    records: list[Record] = []
    nbytes, checksum = 0, b""
    for line in content.splitlines(keepends=True):
        written, _, payload = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or written != _checksum_of(checksum, payload):
            break
        records.append(json.loads(payload))
        nbytes, checksum = nbytes + len(line), written
    return records, nbytes, checksum


def _checksum_of(before: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(before + payload, digest_size=_CHECKSUM_NBYTES).hexdigest().encode()


def _read_all(fd: int) -> bytes:
    chunks = []
    offset = 0
    while chunk := os.pread(fd, 1 << 20, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)
