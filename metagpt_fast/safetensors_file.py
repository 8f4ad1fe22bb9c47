"""One safetensors file: its header, read and validated as hostile input before anything else looks at it.

A file is 8 bytes of little-endian header length, that many bytes of JSON, and the tensors' bytes::

    {"__metadata__": {str: str}, name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header. The tensors must tile the rest of the file without a hole or an
overlap. What the format itself allows is accepted: empty tensors, scalars, any order, any alignment.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dtypes import DTYPES, DType
from .untrusted import DOWNLOAD_AGAIN, brief, open_regular, parse_json_object, read_at, refuse

MAX_HEADER_NBYTES = 100_000_000  # the limit of the reference implementation
CONVERT_PICKLE = (
    'convert it to safetensors first: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER', torch_dtype='auto').save_pretrained('NEW_FOLDER')\""
)

_LENGTH_NBYTES = 8
_MAX_COUNT = 2**63 - 1
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# First bytes of what people have under the name of a safetensors file, and what to do about it. Looked at
# only when the header length is beyond MAX_HEADER_NBYTES, as it is for each of these read as a length.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "the weights were not downloaded: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, probably of torch.save", "give it a name that ends in .bin, or " + CONVERT_PICKLE),
    (b"\x80", "probably a Python pickle", CONVERT_PICKLE),
    (b"GGUF", "a GGUF file", "merge the original safetensors checkpoint, then convert the result to GGUF"),
    (b"<", "probably a web page", "the download returned an error page; " + DOWNLOAD_AGAIN),
    (b"{", "probably JSON text", DOWNLOAD_AGAIN),
)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where one tensor's bytes are.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: dtype of its elements.
        shape: its dimensions; ``()`` for a scalar. Any of them may be 0.
        path: the file that holds it.
        data_offset: absolute offset in that file, in bytes, of the first element. No alignment is promised.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    data_offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file; always a whole number, because the header was validated."""
        return self.numel * self.dtype.bits // 8


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One validated safetensors file, as it was when it was opened.

    Attributes:
        path: the file.
        nbytes: size of the whole file.
        mtime_ns: time of the last change, in nanoseconds.
        header_sha256: SHA-256 of the header's JSON bytes, in hexadecimal.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the header of one file says; ``tensors`` are in the order of their offsets."""

    file: ShardFile
    tensors: list[TensorSource]
    metadata: dict[str, str]


def read_header(path: Path) -> ShardHeader:
    """Read and validate the header of one safetensors file. Reads no tensor data.

    Raises:
        CheckpointError: the file cannot be read, or is anything but a complete, consistent safetensors file.
    """
    with open_regular(path) as (fd, info):
        head = read_at(fd, 64, 0)
        header_nbytes = _header_nbytes(head, info.st_size, path)
        raw = read_at(fd, header_nbytes, _LENGTH_NBYTES)
    if len(raw) != header_nbytes:
        refuse(path, "shrank while it was read", got=f"{len(raw)} bytes of header", expected=str(header_nbytes))
    if not raw.startswith(b"{"):
        refuse(path, "header is not a JSON object", got=brief(raw[:20]), expected="a first byte '{'")

    entries = parse_json_object(raw, path, "header")
    metadata = _checked_metadata(entries.pop("__metadata__", {}), path)
    data_start = _LENGTH_NBYTES + header_nbytes
    rows = sorted(_checked_entry(name, entry, path) for name, entry in entries.items())
    _check_tiling(rows, info.st_size, data_start, path)
    tensors = [
        TensorSource(name, DTYPES[dtype], shape, path, data_start + begin) for begin, _, name, dtype, shape in rows
    ]
    digest = hashlib.sha256(raw).hexdigest()
    return ShardHeader(ShardFile(path, info.st_size, info.st_mtime_ns, digest), tensors, metadata)


def check_tensor_name(name: str, path: Path) -> None:
    """Refuse names that cannot be written as UTF-8, or that would control a terminal when printed."""
    if not name.isprintable() and any(unicodedata.category(char) in {"Cc", "Cs"} for char in name):
        refuse(path, "tensor name holds a control character or a lone surrogate", name)


def _header_nbytes(head: bytes, file_nbytes: int, path: Path) -> int:
    if file_nbytes == 0:
        refuse(path, "file is empty", got="0 bytes", expected="a safetensors file", hint=DOWNLOAD_AGAIN)
    if len(head) < _LENGTH_NBYTES:
        refuse(path, "file is too small for safetensors", got=f"{file_nbytes} bytes", hint=DOWNLOAD_AGAIN)
    header_nbytes = int.from_bytes(head[:_LENGTH_NBYTES], "little")
    room = file_nbytes - _LENGTH_NBYTES
    if header_nbytes <= min(room, MAX_HEADER_NBYTES):
        return header_nbytes
    for magic, kind, hint in _FOREIGN:
        if header_nbytes > MAX_HEADER_NBYTES and head.startswith(magic):
            refuse(path, "is not a safetensors file", got=kind, expected="a safetensors file", hint=hint)
    if header_nbytes > MAX_HEADER_NBYTES:
        expected = f"at most {MAX_HEADER_NBYTES}"
        refuse(
            path,
            "header length is beyond the format's limit",
            got=f"{header_nbytes} bytes",
            expected=expected,
            hint="this is no safetensors file, or a damaged one",
        )
    refuse(
        path,
        "truncated: the header is longer than the file",
        got=f"{room} bytes after the header length",
        expected=f"at least {header_nbytes}",
        hint=DOWNLOAD_AGAIN,
    )


def _checked_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(path, "__metadata__ is not an object", got=brief(value), expected="strings by name")
    for key, text in value.items():
        if not isinstance(text, str):
            refuse(path, f"__metadata__ entry {brief(key)} is not a string", got=brief(text))
        if not (_is_unicode(key) and _is_unicode(text)):
            refuse(path, f"__metadata__ entry {brief(key)} holds a lone surrogate", got=brief(text))
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _checked_entry(name: str, entry: Any, path: Path) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Validate one tensor by itself. Returns (begin, end, name, dtype name, shape), which sorts by offset."""
    check_tensor_name(name, path)
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        refuse(
            path,
            "header entry is malformed",
            name,
            got=brief(entry),
            expected="dtype, shape, data_offsets",
        )
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        refuse(path, "unknown dtype", name, got=brief(dtype_name), expected="one of " + ", ".join(DTYPES))
    if type(shape) is not list:
        refuse(path, "shape is not a list", name, got=brief(shape), expected="a list of counts")
    numel = 1
    for size in shape:
        # Every partial product is checked: one that overflows is refused even where a later 0 would hide it.
        if type(size) is not int or not 0 <= size <= _MAX_COUNT:
            refuse(path, "shape is not valid", name, got=brief(shape), expected="counts from 0 to 2^63 - 1")
        numel *= size
        if numel > _MAX_COUNT:
            refuse(path, "shape overflows", name, got=brief(shape), expected="at most 2^63 - 1 elements")
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        refuse(path, "data_offsets is malformed", name, got=brief(offsets), expected="[begin, end]")
    begin, end = offsets
    if not 0 <= begin <= end:
        refuse(path, "data_offsets is not a range", name, got=brief(offsets), expected="0 <= begin <= end")
    nbytes = dtype.nbytes(numel)
    if nbytes is None:
        refuse(
            path,
            "does not fill whole bytes",
            name,
            got=f"{numel} elements of {dtype.bits} bits",
            expected="a multiple of 8 bits",
        )
    if nbytes != end - begin:
        refuse(
            path,
            "dtype and shape disagree with data_offsets",
            name,
            got=f"{brief(end - begin)} bytes",
            expected=f"{nbytes} bytes for {dtype} {brief(shape)}",
        )
    return begin, end, name, dtype_name, tuple(shape)


def _check_tiling(
    rows: list[tuple[int, int, str, str, tuple[int, ...]]], file_nbytes: int, data_start: int, path: Path
) -> None:
    """Check that tensors sorted by offset fill the file exactly: no hole, no overlap, nothing left over."""
    position = 0
    previous: str | None = None
    for begin, end, name, _, _ in rows:
        if begin != position:
            what = "bytes overlap those before them" if begin < position else "a hole in the data precedes it"
            after = "the header" if previous is None else brief(previous)
            refuse(
                path,
                what,
                name,
                got=f"data_offsets begin {brief(begin)}",
                expected=f"{position}, the end of {after}",
            )
        position, previous = end, name
    promised = data_start + position
    if promised > file_nbytes:
        refuse(
            path,
            "truncated",
            got=f"a file of {file_nbytes} bytes",
            expected=f"{promised} bytes, which its header promises",
            hint=DOWNLOAD_AGAIN,
        )
    if promised < file_nbytes:
        refuse(
            path,
            "bytes follow the last tensor",
            got=f"a file of {file_nbytes} bytes",
            expected=f"{promised} bytes",
            hint=f"something was appended to it; {DOWNLOAD_AGAIN}",
        )
