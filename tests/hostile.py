"""Builders of safetensors files, sound and broken, byte by byte: the official writer makes no broken ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(
    header: Mapping[str, Any] | str | bytes, data: bytes = b"", *, header_nbytes: int | None = None
) -> bytes:
    """A safetensors file of any header (object, JSON text or raw bytes) and data; the length may be a lie."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if header_nbytes is None else header_nbytes) + raw + data


def write_shards(folder: Path, shards: Mapping[str, bytes], weight_map: object, *, stem: str = "model") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    text = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map})
    (folder / f"{stem}.safetensors.index.json").write_text(text)
    return folder


@dataclass(frozen=True)
class BrokenFile:
    """One broken file, and what the message about it must say."""

    label: str
    content: bytes
    says: tuple[str, ...]
    tensor: str | None = None
    official_accepts: bool = False  # where we are stricter than the official reader on purpose


A = entry("F32", [1], 0, 4)
B = entry("F32", [1], 4, 8)
ZEROS = bytes(8)
HUGE = 2**63


def _one(label: str, broken: object, *says: str, **more: bool) -> BrokenFile:
    """Tensor "b" is broken; "a" before it is sound."""
    return BrokenFile(label, file_bytes({"a": A, "b": broken}, ZEROS), says, tensor="b", **more)


def _raw(label: str, header: str | bytes, *says: str, tensor: str | None = None, **more: bool) -> BrokenFile:
    return BrokenFile(label, file_bytes(header, ZEROS[:4]), says, tensor=tensor, **more)


_A = json.dumps(A)

BROKEN_FILES: tuple[BrokenFile, ...] = (
    # The 8 bytes of length, and files that are something else altogether.
    BrokenFile("empty file", b"", ("file is empty", "download it again")),
    BrokenFile("three bytes", b"abc", ("too small", "got 3 bytes")),
    BrokenFile(
        "header longer than file",
        file_bytes({"a": A}, header_nbytes=5000),
        ("header is longer than the file", "got 61 bytes", "expected at least 5000"),
    ),
    BrokenFile(
        "header beyond the limit",
        file_bytes({"a": A}, header_nbytes=100_000_001),
        ("limit", "got 100000001 bytes", "expected at most 100000000"),
    ),
    BrokenFile("header length 2^64-1", b"\xff" * 8 + bytes(80), ("limit", f"got {2**64 - 1} bytes")),
    BrokenFile("zero length", file_bytes(b"", ZEROS), ("not a JSON object",)),
    BrokenFile(
        "git lfs pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n",
        ("Git LFS pointer", "git lfs pull"),
    ),
    BrokenFile("zip pickle", b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), ("torch.save", "save_pretrained")),
    BrokenFile("legacy pickle", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ("pickle", "save_pretrained")),
    BrokenFile("gguf", b"GGUF\x03\x00\x00\x00" + bytes(100), ("GGUF", "original safetensors")),
    BrokenFile("web page", b"<!DOCTYPE html><html>", ("web page", "download it again")),
    BrokenFile("json text", b'{"error": "not found"}', ("JSON text", "download it again")),
    # JSON.
    _raw("not JSON", '{"a": ', "header is not valid JSON", "one UTF-8 JSON object"),
    _raw("not UTF-8", b'{"\xff": 1}', "header is not valid JSON", "utf-8"),
    _raw("UTF-16", '{"a": 1}'.encode("utf-16"), "header is not a JSON object"),
    _raw("array", "[1]", "header is not a JSON object", "got b'[1]'"),
    _raw("trailing NUL", '{"a":' + _A + "}\0", "header is not valid JSON"),
    _raw("leading space", ' {"a":' + _A + "}", "first byte '{'", official_accepts=True),
    _raw("NaN", '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
    _raw("deep nesting", '{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested"),
    _raw("integer of 5000 digits", '{"a":' + "9" * 5000 + "}", "header is not valid JSON"),
    _raw("tensor twice", f'{{"a":{_A},"a":{_A}}}', "the key 'a' twice", official_accepts=True),
    _raw("dtype twice", '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'dtype' twice"),
    _raw("lone surrogate", '{"\\ud800":' + _A + "}", "surrogate", tensor="\\ud800"),
    _raw(
        "escape in name",
        '{"\\u001b[2J":' + _A + "}",
        "control char",
        tensor="\\x1b[2J",
        official_accepts=True,
    ),
    # Metadata.
    _raw("metadata list", '{"__metadata__":[],"a":' + _A + "}", "__metadata__ is not an object", "got []"),
    _raw("metadata number", '{"__metadata__":{"n":1},"a":' + _A + "}", "entry 'n' is not a string", "got 1"),
    _raw("metadata surrogate", '{"__metadata__":{"n":"\\udfff"},"a":' + _A + "}", "entry 'n' holds a lone"),
    # One entry by itself.
    _one("entry is a list", ["F32", [1], [4, 8]], "malformed", official_accepts=True),
    _one("entry is null", None, "malformed", "got None"),
    _one("no shape", {"dtype": "F32", "data_offsets": [4, 8]}, "malformed", "expected dtype, shape"),
    _one("extra key", {**B, "evil": 1}, "malformed", "evil", official_accepts=True),
    _one("unknown dtype", entry("F128", [1], 4, 8), "unknown dtype", "got 'F128'", "BF16"),
    _one("dtype is a list", {**B, "dtype": ["F32"]}, "unknown dtype", "got ['F32']"),
    _one("shape is a number", {**B, "shape": 1}, "shape is not a list", "got 1"),
    _one("shape is negative", entry("F32", [-1], 4, 8), "shape is not valid", "got [-1]"),
    _one("shape is a float", entry("F32", [1.0], 4, 8), "shape is not valid", "got [1.0]"),
    _one("shape is a bool", entry("F32", [True], 4, 8), "shape is not valid", "got [True]"),
    _one("shape is a string", entry("F32", ["1"], 4, 8), "shape is not valid"),
    _one("shape overflows", entry("F32", [2**32, 2**32], 4, 8), "shape overflows", "4294967296"),
    _one("shape overflows to 1", entry("F32", [2**64 + 1], 4, 8), "shape is not valid"),
    _one("zero hides overflow", entry("F32", [2**62, 2**62, 0], 8, 8), "shape overflows"),
    _one("bytes overflow", entry("F64", [2**61], 4, 8), "disagree", f"expected {2**64} bytes"),
    _one("offsets are a number", {**B, "data_offsets": 4}, "data_offsets is malformed", "got 4"),
    _one("three offsets", {**B, "data_offsets": [4, 8, 8]}, "data_offsets is malformed"),
    _one("offset is a float", entry("F32", [1], 4.0, 8), "data_offsets is malformed"),
    _one("offset is a bool", entry("U8", [7], True, 8), "data_offsets is malformed"),
    _one("offset is negative", entry("F32", [1], -4, 0), "not a range", "got [-4, 0]"),
    _one("end before begin", entry("F32", [1], 8, 4), "not a range", "expected 0 <= begin <= end"),
    _one("shape and bytes disagree", entry("F32", [2], 4, 8), "disagree", "got 4 bytes", "expected 8 bytes"),
    _one("half a byte", entry("F4", [7], 4, 8), "whole bytes", "got 7 elements of 4 bits"),
    # All entries together.
    _one(
        "overlap",
        entry("F32", [1], 0, 4),
        "overlap",
        "got data_offsets begin 0",
        "expected 4, the end of 'a'",
    ),
    _one("partial overlap", entry("F32", [1], 3, 7), "overlap", "got data_offsets begin 3"),
    _one("hole", entry("U8", [3], 5, 8), "hole", "got data_offsets begin 5", "expected 4"),
    _one("hole of 2^63", entry("U8", [1], HUGE, HUGE + 1), "hole", f"got data_offsets begin {HUGE}"),
    BrokenFile(
        "empty tensor inside another",
        file_bytes({"a": A, "z": entry("F32", [0], 2, 2)}, ZEROS[:4]),
        ("overlap", "got data_offsets begin 2"),
        tensor="z",
    ),
    BrokenFile(
        "hole at the start",
        file_bytes({"a": B}, ZEROS),
        ("hole", "got data_offsets begin 4", "expected 0, the end of the header"),
        tensor="a",
    ),
    BrokenFile(
        "truncated",
        file_bytes({"a": A, "b": B}, ZEROS[:7]),
        ("truncated", "got a file of 137 bytes", "expected 138 bytes", "download it again"),
    ),
    BrokenFile(
        "garbage at the end",
        file_bytes({"a": A}, ZEROS),
        ("bytes follow", "got a file of 77 bytes", "expected 73"),
    ),
    BrokenFile("no tensors", file_bytes({}), ("holds no tensors",), official_accepts=True),
)

SOUND_FILES: dict[str, bytes] = {
    "plain": file_bytes({"a": A, "b": B}, ZEROS),
    "unordered": file_bytes({"b": B, "a": A}, ZEROS),
    "trailing spaces": file_bytes(json.dumps({"a": A}) + " \n\t  ", ZEROS[:4]),
    "odd data start": file_bytes(json.dumps({"a": A}) + " ", ZEROS[:4]),
    "spaces inside": file_bytes('{ "a" : ' + _A.replace(",", " ,\n") + " }", ZEROS[:4]),
    "empty metadata": file_bytes({"__metadata__": {}, "a": A}, ZEROS[:4]),
    "metadata last": file_bytes({"a": A, "__metadata__": {"x": "1\n\u20ac"}}, ZEROS[:4]),
    "scalar": file_bytes({"a": entry("BF16", [], 0, 2)}, ZEROS[:2]),
    "empty tensor": file_bytes({"a": entry("F32", [3, 0, 2**40], 0, 0)}),
    "empty tensors between": file_bytes(
        {"z": entry("F32", [0], 4, 4), "a": A, "y": entry("F16", [0, 2], 4, 4), "b": B}, ZEROS
    ),
    "empty name": file_bytes({"": A}, ZEROS[:4]),
    "non-ASCII name": file_bytes(json.dumps({"größe.重み.😀\u00a0": A}), ZEROS[:4]),
    "raw UTF-8 name": file_bytes(json.dumps({"größe.重み": A}, ensure_ascii=False), ZEROS[:4]),
    "minus zero in a name": file_bytes({"layer-0": A}, ZEROS[:4]),
    "four bits": file_bytes({"a": entry("F4", [2, 4], 0, 4)}, ZEROS[:4]),
    "six bits": file_bytes({"a": entry("F6_E2M3", [4], 0, 3)}, ZEROS[:3]),
}
