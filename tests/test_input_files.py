"""Open input files: what is read, what is left open, and which file systems are not mapped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from metagpt_fast import input_files
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import BF16
from metagpt_fast.errors import CheckpointError, RecipeError
from metagpt_fast.input_files import InputFiles, copy_range

from .checkpoints import random_states, write_state
from .checksum_oracle import slow_crc32c


@pytest.fixture
def checkpoint(tmp_path):
    state = random_states(95, [(BF16,)], {"a": (1000,), "b": (37,), "c": (9,)})[0]
    return open_checkpoint(write_state(tmp_path / "model", state, num_shards=2, misalignment=3)), state


def paths_of(checkpoint):
    return [shard.path for shard in checkpoint.shards]


def num_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_reads_and_copies_tensors(checkpoint, tmp_path, io):
    opened, state = checkpoint
    before = num_open_files()
    with InputFiles(opened.shards, io) as files, (tmp_path / "copy").open("w+b") as copy:
        assert files.io == io
        for name, source in opened.tensors.items():
            raw = state[name].raw.tobytes()
            assert files.read(source, 0, source.nbytes) == raw
            assert files.read(source, 2, 5) == raw[2:7]
            files.prefetch([(source.path, source.data_offset, source.nbytes)])
            files.release([(source.path, source.data_offset, source.nbytes)])
            assert files.copy(source, copy.fileno(), 11) == slow_crc32c(raw)
            assert os.pread(copy.fileno(), source.nbytes, 11) == raw
            address, descriptor, code = files.place(source, 4)
            assert code == BF16.code
            if io == "pread":
                assert os.pread(descriptor, 2, address) == raw[8:10]
            else:
                assert descriptor == -1
                assert ctypes.string_at(address, 2) == raw[8:10]
    assert num_open_files() == before


def test_a_map_that_fails_leaves_nothing_open(checkpoint, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(errno.ENODEV, "No such device")

    before = num_open_files()
    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(CheckpointError, match="No such device") as caught, InputFiles(checkpoint[0].shards, "mmap"):
        pass
    assert caught.value.hint == "try --io pread"
    assert num_open_files() == before


def test_a_file_that_is_gone_closes_the_others(checkpoint):
    paths = paths_of(checkpoint[0])
    paths[1].unlink()
    before = num_open_files()
    with pytest.raises(CheckpointError, match="No such file"), InputFiles(checkpoint[0].shards, "mmap"):
        pass
    assert num_open_files() == before


def test_a_truncated_file_is_an_error(checkpoint):
    opened, _ = checkpoint
    source = opened.tensors["a"]
    with InputFiles(opened.shards, "pread") as files:
        os.truncate(source.path, source.data_offset + 100)
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            files.read(source, 0, source.nbytes)


def test_unknown_ways_to_read():
    with pytest.raises(RecipeError, match="expected auto, mmap, pread"):
        InputFiles([], "direct")


@pytest.mark.parametrize(
    ("kind", "io"), [("ext4", "mmap"), ("tmpfs", "mmap"), ("nfs4", "pread"), ("fuse.sshfs", "pread"), ("9p", "pread")]
)
def test_auto_looks_at_the_file_system(checkpoint, monkeypatch, kind, io):
    paths = paths_of(checkpoint[0])
    mounts = [(paths[0].parent, kind), (Path("/"), "ext4")]
    monkeypatch.setattr(input_files, "_mounts", lambda: mounts)
    assert InputFiles(checkpoint[0].shards).io == io
    assert InputFiles(checkpoint[0].shards, "mmap").io == "mmap"


def test_mounts_of_this_machine():
    mounts = input_files._mounts()
    assert mounts[-1][0] == Path("/")
    lengths = [len(point.parts) for point, _ in mounts]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_copying_without_copy_file_range(tmp_path, monkeypatch, error):
    content = np.random.default_rng(96).bytes(9 << 20)

    def fallback(*arguments):
        if error is None:
            return 0  # what some special file systems answer
        raise OSError(error, "no")

    monkeypatch.setattr(os, "copy_file_range", fallback)
    (tmp_path / "in").write_bytes(content)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("w+b") as target:
        copy_range(source.fileno(), 5, target.fileno(), 3, len(content) - 5)
        assert (tmp_path / "out").read_bytes() == b"\0\0\0" + content[5:]
        with pytest.raises(OSError, match="ended early"):
            copy_range(source.fileno(), 5, target.fileno(), 3, len(content))


def test_a_signal_before_the_prefetching_thread_has_started(checkpoint, monkeypatch):
    def interrupted_start(thread):
        raise KeyboardInterrupt

    model, _ = checkpoint
    files = InputFiles(model.shards, "mmap")
    with files, monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted_start)
        files.prefetch([(paths_of(model)[0], 0, 1000)])
