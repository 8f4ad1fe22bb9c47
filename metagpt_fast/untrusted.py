"""Reading files that strangers made: open without hanging, parse JSON strictly, quote without harm.

Every failure is one CheckpointError that names the file.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

DOWNLOAD_AGAIN = "download it again"

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = 8
_repr.maxstring = _repr.maxlong = 160


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; yields its descriptor and its status.

    Raises:
        CheckpointError: it cannot be opened or read, or is a folder, a pipe, a device or a socket.
    """
    try:
        # O_NONBLOCK: without it, opening a pipe waits for a writer that may never come.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, device or socket"
            raise CheckpointError("is not a regular file", where=path, got=kind, expected="a file")
        yield fd, info
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(fd)


def read_at(fd: int, nbytes: int, file_offset: int) -> bytes:
    """Return up to ``nbytes`` bytes from ``file_offset`` on; fewer only where the file ends."""
    chunks: list[bytes] = []
    while nbytes > 0:
        chunk = os.pread(fd, nbytes, file_offset)
        if not chunk:
            break
        chunks.append(chunk)
        nbytes -= len(chunk)
        file_offset += len(chunk)
    return b"".join(chunks)


def unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    """Return the error to raise for a file or folder that the operating system will not let us read."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        target = path.readlink()
        hint = f"complete the download, or {DOWNLOAD_AGAIN}"
        return CheckpointError("is a symlink to a file that does not exist", where=path, got=target, hint=hint)
    if isinstance(error, FileNotFoundError):
        return CheckpointError("does not exist", where=path, hint="check the path")
    if isinstance(error, PermissionError):
        return CheckpointError("cannot be read: permission denied", where=path, hint="make it readable")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError("cannot be read", where=ascii(str(path)) if "\0" in str(path) else path, got=reason)


def parse_json_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse strict JSON (UTF-8, no duplicate keys, no NaN) whose top level is an object.

    Args:
        raw: the JSON text.
        path: the file it is from, for the message.
        what: what the text is ("header", "index"), for the message.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        text = raw.decode("utf-8")
        # Python reads "-0" as the integer 0; in JSON it is a negative zero, which no count or offset can be.
        parse_int = _parse_int if "-0" in text else None
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=parse_int)
    except RecursionError as error:
        raise CheckpointError(f"{what} is not valid JSON", where=path, got="too many nested levels") from error
    except ValueError as error:  # covers JSON, UTF-8, duplicate keys, and integers of thousands of digits
        raise CheckpointError(
            f"{what} is not valid JSON",
            where=path,
            got=error,
            expected="one UTF-8 JSON object",
            hint=DOWNLOAD_AGAIN,
        ) from error
    if not isinstance(value, dict):
        got = f"a {type(value).__name__}"
        raise CheckpointError(f"{what} is not a JSON object", where=path, got=got, expected="an object")
    return value


def refuse(path: Path, what: str, tensor: str | None = None, **parts: str) -> NoReturn:
    """Raise the CheckpointError of a file, or of one of its tensors."""
    where = str(path) if tensor is None else f"{path}, tensor {brief(tensor)}"
    raise CheckpointError(what, where=where, **parts)


def brief(value: object) -> str:
    """Return ``repr(value)`` cut short, for use in a message: escaped, and of bounded length."""
    return _repr.repr(value)


def printable(value: object) -> str:
    """Return ``value`` as text whose control characters and broken surrogates are written as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {brief(key)} twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which JSON does not have")


def _parse_int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)
