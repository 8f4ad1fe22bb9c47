"""The hashes that tell whether a file of an output still has the bytes that were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .output_shards import OutputShard
from .untrusted import open_regular

ALGORITHM = "blake2b"
_DIGEST_NBYTES = 32
_CHUNK_NBYTES = 4 << 20
_Item = TypeVar("_Item")


def output_record(shards: Sequence[OutputShard], hashes: Sequence[str]) -> dict[str, Any]:
    """Return what ``metagpt_fast.json`` says under ``output``: name, size and hash of every file."""
    return {
        "shards": [
            {"name": shard.file_name, "nbytes": shard.nbytes, ALGORITHM: digest}
            for shard, digest in zip(shards, hashes, strict=True)
        ]
    }


def hash_files(
    paths: Sequence[Path], num_threads: int, advance: Callable[[int], None] = lambda nbytes: None
) -> list[str]:
    """Return the BLAKE2b-256 of each file's bytes, in hexadecimal.

    Args:
        paths: the files.
        num_threads: how many are read at a time, as hashing is slower than a disk.
        advance: is told about every few MiB that are done, from one of these threads.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def hash_file(path: Path) -> str:
        with open_regular(path) as (fd, _):
            return _hash(fd, advance)

    return _map(hash_file, paths, num_threads)


def hash_open_files(fds: Sequence[int], num_threads: int) -> list[str]:
    """Return the same of open files; raises OSError."""
    return _map(lambda fd: _hash(fd, lambda nbytes: None), fds, num_threads)


def _hash(fd: int, advance: Callable[[int], None]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    offset = 0
    while chunk := os.pread(fd, _CHUNK_NBYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _map(function: Callable[[_Item], str], items: Sequence[_Item], num_threads: int) -> list[str]:
    with ThreadPoolExecutor(max(1, min(num_threads, len(items)))) as pool:
        return list(pool.map(function, items))
