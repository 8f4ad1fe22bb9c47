"""The way through a device: the CPU's bytes, whatever the device delays and reorders; and no slot is used too early."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast import devices, merging
from metagpt_fast._native import FileOperandError, crc32c, place_of
from metagpt_fast.backends import slices, streaming
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.slices import Limits, cut_into_slices, reads_of
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.backends.tables import LayerTable, OutputTable, output_table
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.errors import BackendError, DataError

from .arrays import IN_MEMORY, Buffer, make_layer
from .checkpoints import integers, random_states, tensor_bytes, write_family
from .cuda_emulation import EmulatedCompute
from .fake_device import FakeDevice, RaceError, fake
from .kernel_calls import FileBuffer, dtype_code, layer_table_of
from .tools import cxx_compiler

__all__ = ["fake"]  # a fixture

SPAN = 262144
# Tensors of several spans and tiny ones; in slices of one span that makes more slices than there are slots.
SIZES = (5, 800_003, 0, 17, 3 * SPAN, 4096, 300_000, 2 * SPAN + 1, 70)
MEMORY = 32 << 20


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(streaming, "_SLICE_NBYTES", 1)


@pytest.fixture(scope="module")
def layer():
    return make_layer(np.random.default_rng(1), (BF16, BF16, F32), SIZES, misalignments=(0, 1, 2, 7))


@pytest.fixture(scope="module")
def coefficients():
    return np.random.default_rng(2).normal(size=(len(SIZES), 2))


@pytest.fixture(scope="module")
def expected(layer, coefficients):
    return run(CpuBackend(), layer, coefficients)


def out_table(out) -> OutputTable:
    return output_table([(buffer.address, buffer.descriptor, dtype_code(buffer)) for buffer in out])


def run(backend, layer, coefficients):
    """Return Gram matrices, outputs in two dtypes, and counts."""
    table = layer_table_of(layer)
    gram = np.full((len(layer), 3, 3), 0.25)
    backend.layer_gram(table, gram)
    out = [Buffer((BF16, F32)[k % 2], tensor[0].numel, k % 3) for k, tensor in enumerate(layer)]
    written = backend.layer_merge(table, coefficients, out_table(out))
    assert not written.crcs.any()
    assert all(buffer.guards_intact() for buffer in out)
    return gram.tobytes(), [buffer.raw.tobytes() for buffer in out], written.num_nonfinite.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_gives_the_cpus_bytes(layer, coefficients, expected, seed):
    device = FakeDevice(seed)
    backend = StreamedBackend(device, MEMORY)
    for _ in range(2):  # the second time, slots and results are used again
        assert run(backend, layer, coefficients) == expected
    backend.close()
    assert device.num_launches > 4 * 2 * slices.NUM_SLOTS
    assert device.peak_nbytes <= MEMORY + 4096


@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")
def test_the_cuda_kernels_on_the_host(coefficients):
    layer = make_layer(np.random.default_rng(3), (BF16, BF16, BF16), (5, 300_001, 0, 9000, SPAN))
    wanted = run(CpuBackend(), layer, coefficients[:5])
    assert run(StreamedBackend(FakeDevice(1, EmulatedCompute()), MEMORY), layer, coefficients[:5]) == wanted


class Careless(FakeDevice):
    """Leaves out one kind of wait: ``wait`` or ``synchronize``, by its place among the calls for one slice."""

    def __init__(self, seed, method, phase, period):
        super().__init__(seed)
        self._left_out = method, phase, period
        self._calls = {"wait": 0, "synchronize": 0}

    def _leaves_out(self, method):
        name, phase, period = self._left_out
        self._calls[method] += 1
        return name == method and self._calls[method] % period == phase

    def wait(self, stream, event):
        if not self._leaves_out("wait"):
            super().wait(stream, event)

    def synchronize(self, event):
        if not self._leaves_out("synchronize"):
            super().synchronize(event)


def fails(device, layer, coefficients, expected):
    backend = StreamedBackend(device, MEMORY)
    try:
        return run(backend, layer, coefficients) != expected
    except RaceError:
        return True


@pytest.mark.parametrize("method", ["wait", "synchronize"])
@pytest.mark.parametrize("period", [1, 2, 3, 4])
def test_every_wait_is_needed(layer, coefficients, expected, method, period):
    """Whichever of them is left out regularly, the fake device notices."""
    for phase in range(period):
        assert fails(Careless(0, method, phase, period), layer, coefficients, expected), (method, phase, period)


@pytest.mark.parametrize("event", ["copied in", "computed", "slot read", "slot written"])
def test_each_rule_of_the_ring_is_needed(layer, coefficients, expected, event, monkeypatch):
    """The table in streaming.py, row by row."""
    device = FakeDevice(0)
    backend = StreamedBackend(device, MEMORY)
    pipeline = backend._pipeline
    copied_in = [id(slot.copied) for slot in pipeline._inputs]
    copied_out = [id(slot.copied) for slot in pipeline._outputs]
    computed = [id(each) for each in pipeline._computed]
    skipped_waits = {"copied in": copied_in, "computed": computed}.get(event, [])
    skipped_synchronizations = {"slot read": copied_in, "slot written": copied_out}.get(event, [])
    wait, synchronize = device.wait, device.synchronize
    monkeypatch.setattr(device, "wait", lambda s, e: None if id(e) in skipped_waits else wait(s, e))
    monkeypatch.setattr(device, "synchronize", lambda e: None if id(e) in skipped_synchronizations else synchronize(e))
    try:
        assert run(backend, layer, coefficients) != expected
    except RaceError:
        return


def test_files(layer, coefficients, expected, tmp_path):
    """Operands and outputs in files, at any offset."""
    in_files = [
        [FileBuffer(tmp_path / f"{k}-{i}", buffer, 3 + 5 * i) for i, buffer in enumerate(tensor)]
        for k, tensor in enumerate(layer)
    ]
    backend = StreamedBackend(FakeDevice(3), MEMORY)
    table = layer_table_of(in_files)
    gram = np.full((len(layer), 3, 3), 0.25)
    backend.layer_gram(table, gram)
    assert gram.tobytes() == expected[0]
    outs = [
        FileBuffer(tmp_path / f"out{k}", Buffer((BF16, F32)[k % 2], tensor[0].numel), 9)
        for k, tensor in enumerate(layer)
    ]
    written = backend.layer_merge(table, coefficients, out_table(outs))
    assert [out.raw.tobytes() for out in outs] == expected[1]
    assert written.num_nonfinite.tolist() == expected[2]
    assert written.crcs.tolist() == [crc32c(out.raw) for out in outs]
    assert all(out.guards_intact() for out in outs)
    for buffer in (*outs, *(each for tensor in in_files for each in tensor)):
        buffer.close()


@pytest.mark.parametrize("kind", ["truncated", "directory"])
def test_a_file_that_cannot_be_read(layer, coefficients, expected, tmp_path, kind):
    file = FileBuffer(tmp_path / "operand", layer[4][1], 3)
    os.truncate(file.path, 1_000_000)
    if kind == "directory":
        file.close()
        file.descriptor = os.open(tmp_path, os.O_RDONLY)
    broken = [list(tensor) for tensor in layer]
    broken[4][1] = file
    device = FakeDevice(1)
    backend = StreamedBackend(device, MEMORY)
    with pytest.raises(FileOperandError, match="ended early" if kind == "truncated" else "directory") as caught:
        backend.layer_gram(layer_table_of(broken), np.zeros((len(layer), 3, 3)))
    assert place_of(caught.value) == (4, 1)
    assert not any(stream.queue for stream in device._streams)
    assert run(backend, layer, coefficients) == expected  # and the slots are as good as new
    file.close()


def test_a_disk_that_is_full(layer, coefficients, expected, tmp_path):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    out = [Buffer(BF16, tensor[0].numel) for tensor in layer]
    table = out_table(out)
    table.files[6], table.addresses[6] = descriptor, 0
    backend = StreamedBackend(FakeDevice(2), MEMORY)
    with pytest.raises(FileOperandError, match="No space left") as caught:
        backend.layer_merge(layer_table_of(layer), coefficients, table)
    assert place_of(caught.value) == (6, -1)
    os.close(descriptor)
    assert run(backend, layer, coefficients) == expected


def table_of_zeros(num_tensors, num_operands, dtype):
    shape = (num_tensors, num_operands)
    addresses, files = np.zeros(shape, np.uint64), np.full(shape, IN_MEMORY, np.int32)
    return LayerTable(addresses, files, np.full(shape, dtype.code, np.uint8), np.zeros(num_tensors, np.int64), True)


@pytest.mark.parametrize("num_operands", [2, 4, 34])
def test_slices_cover_the_layer(num_operands):
    rng = np.random.default_rng(num_operands)
    sizes = [int(numel) for numel in rng.integers(0, 3 * SPAN, 5)] + [1] * 3000 + [0]
    layer = table_of_zeros(len(sizes), num_operands, F64)
    layer.numels[:] = sizes
    layer.addresses[:] = np.arange(1, num_operands + 1, dtype=np.uint64) << np.uint64(40)
    layer.addresses[:] += np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)[:, None] * np.uint64(8)
    limits = Limits(SPAN * 8 * num_operands + 20_000, 1 << 20, 1024)
    done = np.zeros(len(sizes), np.int64)
    for part in cut_into_slices(layer, None, limits):
        assert part.nbytes <= limits.nbytes
        assert np.sum(-(-part.numels // 4096)) <= limits.num_blocks
        assert np.array_equal(part.firsts, done[part.tensors])
        done[part.tensors] += part.numels
        assert not np.any(part.firsts % SPAN)
        assert not np.any(part.offsets % 16)
        spans = sorted((read.offset, read.offset + read.nbytes) for read in reads_of(part, layer))
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert sum(end - start for start, end in spans) == part.numels.sum() * 8 * num_operands
    assert done.tolist() == sizes


def test_neighbours_are_read_in_one_go():
    layer = table_of_zeros(50, 3, BF16)
    layer.numels[:] = 4096
    layer.addresses[:] = (np.arange(50)[:, None] * 8192 + np.arange(3) * (1 << 30)).astype(np.uint64)
    (part,) = cut_into_slices(layer, None, Limits(8 << 20, 8 << 20, 1024))
    assert [(read.address, read.nbytes) for read in reads_of(part, layer)] == [(i << 30, 50 * 8192) for i in range(3)]


def test_too_little_device_memory(layer):
    with pytest.raises(BackendError, match=r"too little device memory .* give --device-memory \d+MiB"):
        StreamedBackend(FakeDevice(), 4 << 20).layer_gram(layer_table_of(layer), np.zeros((len(layer), 3, 3)))


# ------------------------------------------------------------------------------ merges of files

SHAPES = {"layers.0.a": (300, 7), "layers.0.large": (800_003,), "layers.1.b": (64, 65), "scale": (), "head": (51, 40)}
DTYPES = [(BF16, BF16, F32, F64), (BF16,), (F16, F32)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    states = random_states(21, DTYPES, SHAPES)
    for state in states:
        state["ids"] = integers([1, 2, 3])
    return write_family(tmp_path_factory.mktemp("family"), states, num_shards=2, misalignment=5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "layer"},
        {"granularity": "tensor", "io": "pread"},
        {"method": "task_arithmetic", "memory": "64MiB"},
        {"method": "linear", "coefficients": (3, 1), "dtype": "f32"},
        {"exclude": "head", "io": "pread"},
    ],
    ids=str,
)
def test_merges_have_the_cpus_bytes(family, fake, tmp_path, settings):
    base, models = family
    cpu = mf.merge(base, models, tmp_path / "cpu", **settings)
    report = mf.merge(base, models, tmp_path / "cuda", device="cuda", device_memory="48MiB", **settings)
    assert tensor_bytes(tmp_path / "cuda") == tensor_bytes(tmp_path / "cpu")
    assert np.array_equal(report.coefficients, cpu.coefficients)
    assert (report.backend, report.device, report.device_reason) == ("cuda", "fake:0", "asked for")
    (device,) = fake
    assert device.num_launches > 0
    assert device.is_closed


@pytest.mark.parametrize("batch_nbytes", [4 << 20, 1 << 30])
def test_the_ring_drains_once_per_batch(family, fake, tmp_path, monkeypatch, batch_nbytes):
    """Batches for a device are larger than the CPU's: up to half of --memory."""
    base, models = family
    num_runs = 0
    run_slices = streaming.Pipeline.run

    def count(self, slices, job):
        nonlocal num_runs
        num_runs += 1
        run_slices(self, slices, job)

    monkeypatch.setattr(streaming.Pipeline, "run", count)
    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1)  # the CPU's
    monkeypatch.setattr(devices, "_DEVICE_BATCH_NBYTES", batch_nbytes)
    mf.merge(base, models, tmp_path / "cuda", device="cuda", device_memory="48MiB")
    # 11 MB of base and models; the large tensor is cut at spans.
    assert num_runs == (2 if batch_nbytes == 1 << 30 else 6)
    mf.merge(base, models, tmp_path / "cpu")
    assert tensor_bytes(tmp_path / "cuda") == tensor_bytes(tmp_path / "cpu")


def test_measurements_have_the_cpus_bits(family, fake):
    base, models = family
    assert np.array_equal(
        mf.measure(base, models).gram, mf.measure(base, models, device="cuda:3", device_memory="48MiB").gram
    )
    assert fake[0].is_closed


def test_nan_is_named(fake, tmp_path):
    states = random_states(22, DTYPES, SHAPES)
    states[1]["layers.0.large"].raw[1_000_000:1_000_002] = 0xFF
    base, models = write_family(tmp_path / "in", states)
    for granularity in ("model", "tensor"):
        with pytest.raises(DataError, match=r"layers\.0\.large.* holds NaN or Inf.* index 500000"):
            mf.merge(base, models, tmp_path / "out", device="cuda", device_memory="48MiB", granularity=granularity)
    assert not (tmp_path / "out").exists()
    assert [device.is_closed for device in fake] == [True, True]


def test_a_merge_with_too_little_device_memory(family, fake, tmp_path):
    base, models = family
    with pytest.raises(BackendError, match="too little device memory"):
        mf.merge(base, models, tmp_path / "out", device="cuda", device_memory="1MiB")
    assert not (tmp_path / "out").exists()
    assert fake[0].is_closed
