"""Inputs that fail while they are read: truncated under a mapping, replaced, changed, on a failing disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast import input_files, merging, verifying
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import BF16, F32
from metagpt_fast.input_files import InputFiles

from .checkpoints import random_states, tensor_bytes, write_family
from .tools import ROOT, cxx_compiler, run_checked

# Several batches of 1 MiB, of which the first is whole.
SHAPES = {"head": (999,), **{f"layers.{i}.w": (256, 300) for i in range(8)}, "last": (77,)}
METHODS = {
    "metagpt": {},
    "by layer": {"granularity": "layer"},
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {"density": 0.4}},
    "della": {"method": "della", "parameters": {"density": 0.5}},
    "rows": {"method": "model_stock", "parameters": {"filter_wise": True}},
    "copied": {"exclude": "layers.[4-7]"},
    "reference": {"backend": "reference"},
}


@pytest.fixture
def family(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1 << 20)
    monkeypatch.setattr(verifying, "_MAX_WINDOW_NBYTES", 1 << 20)
    return write_family(tmp_path / "in", random_states(31, [(BF16,)] * 4, SHAPES))


class Interference:
    """Progress that does something to the inputs once a batch is done."""

    def __init__(self, act):
        self.act = act
        self.num_done = 0

    def start(self, phase, total_nbytes):
        pass

    def advance(self, nbytes):
        self.num_done += 1
        if self.num_done == 1:
            self.act()

    def finish(self):
        pass


def num_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def num_maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


def weights_of(path):
    return path / "model.safetensors"


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_file_that_is_truncated_while_it_is_read(family, tmp_path, settings, io):
    """Through a mapping that is SIGBUS, which would end this process."""
    base, models = family
    for path in (base, models[1]):
        truncate_while_merging(base, models, weights_of(path), tmp_path, {"io": io, **settings})
    mf.merge(base, models, tmp_path / "out", **settings)


def truncate_while_merging(base, models, weights, folder, settings):
    whole = weights.read_bytes()
    before = num_files()
    truncate = Interference(lambda: os.truncate(weights, 1 << 16))
    with pytest.raises(mf.CheckpointError) as caught:
        mf.merge(base, models, folder / "out", progress=truncate, **settings)
    assert truncate.num_done >= 1
    assert str(weights) in str(caught.value)
    is_read = weights.parent != base or settings.get("method") != "linear"
    expected = "the file was truncated while it was read" if is_read else "file has changed since it was opened"
    assert caught.value.what == expected
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert num_files() == before
    weights.write_bytes(whole)


def test_measuring_and_verifying_survive_a_truncated_file(family, tmp_path):
    base, models = family
    mf.merge(base, models, tmp_path / "out")
    weights = weights_of(models[0])
    whole = weights.read_bytes()
    with pytest.raises(mf.CheckpointError, match="truncated while it was read"):
        mf.measure(base, models, progress=Interference(lambda: os.truncate(weights, 1 << 16)))
    weights.write_bytes(whole)

    class Late(Interference):
        def start(self, phase, total_nbytes):
            self.num_done = 1 if phase == "checksum" else 0

    with pytest.raises(mf.CheckpointError, match="truncated while it was read"):
        mf.verify(tmp_path / "out", full=True, progress=Late(lambda: os.truncate(weights, 1 << 16)))


def test_a_bus_error_elsewhere_still_ends_the_process():
    """Ours is not to hide: a fault outside of the inputs goes to the handler that was there before."""
    code = """
import ctypes, mmap, os, tempfile
from metagpt_fast import _native
def mapped():
    file = tempfile.TemporaryFile()
    file.write(bytes(mmap.PAGESIZE)); file.flush()
    view = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    os.ftruncate(file.fileno(), 0)
    return view, ctypes.addressof(ctypes.c_char.from_buffer(view))
guarded, address = mapped()
guard = _native.guard_mapping(address, mmap.PAGESIZE)
assert ctypes.string_at(address, 1) == b"\\0"
assert _native.fault_offset(guard) == 0
print("went on", flush=True)
other, elsewhere = mapped()
ctypes.string_at(elsewhere, 1)
print("not reached", flush=True)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stdout == "went on\n", finished.stderr
    assert finished.returncode == -7  # SIGBUS


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_file_that_is_replaced_while_it_is_read(family, tmp_path, io):
    base, models = family

    def replace():
        (tmp_path / "new").write_bytes(weights_of(models[0]).read_bytes())
        (tmp_path / "new").replace(weights_of(models[0]))

    with pytest.raises(mf.MetagptFastError, match="changed") as caught:
        mf.merge(base, models, tmp_path / "out", progress=Interference(replace), io=io)
    assert str(models[0]) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["metagpt", "ties"])
def test_a_file_that_is_written_while_it_is_read(family, tmp_path, method):
    """Time and sampled pages are compared at the end; before that, no value may break a kernel."""
    base, models = family
    weights = weights_of(models[2])
    noise = np.random.default_rng(32).bytes(weights.stat().st_size - 4096)

    def write():
        with weights.open("r+b") as file:
            file.seek(4096)
            file.write(noise)

    with pytest.raises(mf.MetagptFastError) as caught:
        mf.merge(base, models, tmp_path / "out", method=method, progress=Interference(write))
    assert str(models[2]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_deleted_or_forbidden_at_the_end(family, tmp_path, monkeypatch):
    base, models = family
    weights = weights_of(models[0])
    with pytest.raises(mf.CheckpointError, match="does not exist") as caught:
        mf.merge(base, models, tmp_path / "out", progress=Interference(weights.unlink))
    assert str(weights) in str(caught.value)


def test_a_file_that_changes_before_it_is_mapped(family):
    """Offsets of one header must not be applied to another file: behind its end there is other memory."""
    checkpoint = open_checkpoint(family[0])
    os.truncate(weights_of(family[0]), 5000)
    for io in ("mmap", "pread"):
        with (
            pytest.raises(mf.CheckpointError, match="has changed since it was opened"),
            InputFiles(checkpoint.shards, io),
        ):
            pass


def test_a_disk_that_fails_under_a_mapping(family, monkeypatch):
    """A page within the file that cannot be read: the disk, not the file's size."""
    checkpoint = open_checkpoint(family[0])
    with InputFiles(checkpoint.shards, "mmap") as files:
        monkeypatch.setattr(input_files._native, "fault_offset", lambda guard: 4096)
        with pytest.raises(mf.CheckpointError, match="its disk has failed: got an error at byte 4096"):
            files.check()


@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")
def test_reads_that_fail_at_any_call(tmp_path):
    """`python tests/read_faults.py FOLDER 1` with the same library tries every call."""
    library = tmp_path / "faulty_reads.so"
    compiler = cxx_compiler().replace("g++", "gcc").replace("c++", "cc")
    run_checked([compiler, "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/cpp/faulty_reads.c", "-ldl"])
    (tmp_path / "work").mkdir()
    command = [sys.executable, ROOT / "tests/read_faults.py", tmp_path / "work", "47"]
    output = run_checked(command, LD_PRELOAD=str(library), METAGPT_FAST_THREADS="2")
    assert json.loads(output)["num_faults"] > 80


def test_a_hundred_merges_leave_nothing_behind(tmp_path):
    """In one process: files, mappings and memory stay what they were."""
    base, models = write_family(tmp_path / "in", random_states(33, [(BF16,), (F32,), (BF16,)], SHAPES))
    settings = [{}, {"method": "ties"}, {"io": "pread"}, {"granularity": "layer"}]
    expected = []
    for each in settings:  # what is allocated once
        mf.merge(base, models, tmp_path / "out", overwrite=True, **each)
        expected.append(tensor_bytes(tmp_path / "out"))
        mf.verify(tmp_path / "out")

    def measure():
        text = Path("/proc/self/smaps_rollup").read_text()
        anonymous = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))
        return num_files(), num_maps(), anonymous

    for i in range(8):
        mf.merge(base, models, tmp_path / "out", overwrite=True, **settings[i % 4])
    files, maps, _ = measure()
    memory = []
    for i in range(100):
        mf.merge(base, models, tmp_path / "out", overwrite=True, **settings[i % 4])
        assert tensor_bytes(tmp_path / "out") == expected[i % 4]
        if i % 10 == 9:
            mf.verify(tmp_path / "out")
            memory.append(measure()[2])
    after = measure()
    assert after[0] == files
    assert after[1] <= maps + 4  # the allocator's own
    # KiB. The allocator keeps what it likes, so the least of each half; a merge's buffers and inputs are 3 MB.
    assert min(memory[5:]) <= min(memory[:5]) + 8192, memory
    shutil.rmtree(tmp_path / "in")
