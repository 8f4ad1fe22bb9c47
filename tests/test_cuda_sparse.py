"""The sparse kernels for CUDA, run on the host through the streamed backend, against the CPU's kernels: every bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from metagpt_fast import _native
from metagpt_fast.backends import streamed_threshold, streaming
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.errors import BackendError

from .arrays import (
    Buffer,
    bit_patterns,
    buffer_of,
    differing,
    dtype_names,
    encode,
    make_layer,
    make_out,
    special_values,
)
from .fake_device import FakeDevice
from .kernel_calls import FileBuffer, layer_table_of
from .sparse_calls import (
    ALL,
    BAND,
    CPU,
    IMPORTANCE,
    MAGNITUDE,
    NEAR,
    RANDOM,
    RANKED,
    VARIANCE,
    Keys,
    empty_masks,
    out_table_of,
    random_election,
    random_masks,
    random_ranks,
)
from .test_streaming import Careless
from .tools import cxx_compiler

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

MEMORY = 48 << 20
SPAN = 262144
# Around 16 lanes, a warp, a block and two of a warp; several spans.
SIZES = (0, 1, 3, 17, 33, 70, 700, 4095, 4097, 8192, 0, 12345)
LARGE = (5, 2 * SPAN + 70, 0, SPAN, 4097)
DTYPES = [(BF16,) * 3, (F16,) * 4, (F32,) * 2, (F64, BF16, F32), (F32, BF16, F16, BF16, F32), (BF16, F64)]
KEYS = (MAGNITUDE, VARIANCE, IMPORTANCE)
ALL_KINDS = (ALL, BAND, RANDOM, RANKED, NEAR)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Slices of one span, and thresholds of small tensors on the device too."""
    monkeypatch.setattr(streaming, "_SLICE_NBYTES", 1)
    monkeypatch.setattr(streamed_threshold, "_LEAST_COUNTED", 1)


def backend(seed=1, memory=MEMORY):
    return StreamedBackend(FakeDevice(seed), memory)


def check_threshold(layer, keys, ranks, device=None):
    table, device = layer_table_of(layer), device or backend()
    expected = CPU.layer_threshold(table, *keys.arguments, ranks)
    found = device.layer_threshold(table, *keys.arguments, ranks)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    nonzero = device.layer_count_nonzero(table, *keys.arguments)
    np.testing.assert_array_equal(nonzero, CPU.layer_count_nonzero(table, *keys.arguments))


def check_masks(layer, masks, election, out_dtypes, device=None):
    """Compare moments and election, without room for bits and with it, as it is after moments."""
    table, device = layer_table_of(layer), device or backend()
    expected = make_out(layer, out_dtypes, (0, 3, 1))
    counts = CPU.layer_elect(table, masks, election, out_table_of(expected)).num_nonfinite
    shape = masks.kinds.shape
    rooms = [np.full((shape[1], -(-tensor[0].numel // 64)), 2**64 - 1, np.uint64) for tensor in layer]
    bits = np.array([[row.ctypes.data if row.size else 0 for row in room] for room in rooms], np.uint64)
    wanted = CPU.layer_moments(table, masks)
    for each in (masks, replace(masks, bits=np.where(np.isin(masks.kinds, (BAND, RANDOM, RANKED)), bits, 0))):
        moments = device.layer_moments(table, each)
        same = (moments == wanted) | (np.isnan(moments) & np.isnan(wanted))
        assert same.all(), (np.argwhere(~same)[:3], masks.kinds[np.argwhere(~same)[0][0]])
        out = make_out(layer, out_dtypes, (0, 3, 1))
        written = device.layer_elect(table, each, election, out_table_of(out))
        for k, (got, want) in enumerate(zip(out, expected, strict=True)):
            wrong = differing(got.raw, want.raw, got.dtype)[:3]
            assert not wrong.size, f"tensor {k} of {got.numel} at {wrong}: kinds {masks.kinds[k]}"
            assert got.guards_intact()
        assert written.num_nonfinite.tolist() == counts.tolist()


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_thresholds(dtypes, kind):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, dtypes, SIZES, misalignments=(0, 1, 2, 3))
    keys = Keys(layer, kind)
    check_threshold(layer, keys, random_ranks(rng, layer, keys))


@pytest.mark.parametrize("kind", KEYS)
def test_thresholds_of_tensors_in_pieces(kind):
    rng = np.random.default_rng(2)
    layer = make_layer(rng, (BF16,) * 3, LARGE)
    keys = Keys(layer, kind)
    check_threshold(layer, keys, random_ranks(rng, layer, keys))


@pytest.mark.parametrize("raws", [special_values, bit_patterns])
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32,) * 2, (F64, F16)], ids=dtype_names)
def test_thresholds_of_special_values(dtypes, raws):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, dtypes, (700, 33, 5), raws=raws)
    for kind in KEYS:
        keys = Keys(layer, kind)
        check_threshold(layer, keys, random_ranks(rng, layer, keys))


@pytest.mark.parametrize("values", ["one value", "few values", "all different"])
def test_equal_keys_are_told_apart_by_their_indices(values):
    """In a tensor of three spans: the first, the last and those at the spans' ends among the equal ones."""
    rng, numel = np.random.default_rng(4), 2 * SPAN + 1000
    delta = {
        "one value": np.full(numel, 0.5),
        "few values": rng.integers(-2, 3, numel) * 0.25,
        "all different": rng.permutation(numel) / numel,
    }[values]
    layer = [[buffer_of(encode(np.zeros(numel), F32), F32), buffer_of(encode(delta, F32), F32)]]
    ranks = np.array([0, 1, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN - 1, numel - 2, numel - 1, -1]).reshape(1, 1, -1)
    check_threshold(layer, Keys(layer), ranks)


def test_thresholds_of_more_tensors_than_counts_fit():
    """Groups of tensors whose counts fit the scratch memory, and small ones on the CPU in between."""
    rng = np.random.default_rng(5)
    layer = make_layer(rng, (BF16,) * 3, (3000, 10, 4000, 5000, 20, 6000, 30, 7000, 8000, 9000, 9001))
    keys = Keys(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_threshold, "_LEAST_COUNTED", 100)
        check_threshold(layer, keys, random_ranks(rng, layer, keys, 2))


def test_too_little_device_memory_for_counts():
    layer = make_layer(np.random.default_rng(6), (BF16,) * 9, (300,))
    ranks = np.zeros((1, 8, 1), np.int64)
    with pytest.raises(BackendError, match=r"count the keys of a tensor.* give --device-memory 37MiB"):
        backend(memory=20 << 20).layer_threshold(layer_table_of(layer), *Keys(layer).arguments, ranks)
    check_threshold(layer, Keys(layer), ranks, backend(memory=37 << 20))


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_masks(dtypes, kind):
    rng = np.random.default_rng(7)
    layer = make_layer(rng, dtypes, SIZES, misalignments=(0, 1, 2, 3))
    keys = Keys(layer, kind)
    masks = random_masks(rng, layer, keys, ALL_KINDS)
    check_masks(layer, masks, random_election(rng, layer), (dtypes[0], BF16, F16, F32, F64))


@pytest.mark.parametrize("mask", ALL_KINDS)
@pytest.mark.parametrize("num_models", [1, 3, 6])
def test_masks_of_one_kind(mask, num_models):
    rng = np.random.default_rng(8)
    layer = make_layer(rng, (BF16,) * (1 + num_models), (1, 5, 63, 513, 4097))
    masks = random_masks(rng, layer, Keys(layer), [mask])
    for is_plain in (False, True):
        check_masks(layer, masks, random_election(rng, layer, plain=is_plain), (BF16, F32))


@pytest.mark.parametrize("raws", [special_values, bit_patterns])
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32,) * 4, (F64, F16, BF16)], ids=dtype_names)
def test_masks_of_special_values(dtypes, raws):
    rng = np.random.default_rng(9)
    layer = make_layer(rng, dtypes, (700, 700, 700, 33, 5), raws=raws)
    for mask in ALL_KINDS:
        masks = random_masks(rng, layer, Keys(layer), [mask])
        check_masks(layer, masks, random_election(rng, layer), (BF16, F16, F32, F64))


@pytest.mark.parametrize("kind", [MAGNITUDE, IMPORTANCE])
@pytest.mark.parametrize("seed", range(4))
def test_tensors_in_pieces_in_any_order(seed, kind):
    """Several spans, as many slices; the second device carries out in a random order, the first no more than needed."""
    rng = np.random.default_rng(10)
    layer = make_layer(rng, (BF16,) * 3, LARGE)
    keys = Keys(layer, kind)
    masks = random_masks(rng, layer, keys, (ALL, BAND, RANDOM, NEAR))
    device = backend(seed)
    check_masks(layer, masks, random_election(rng, layer), (BF16, F32), device)
    fake = device._device
    device.close()
    assert fake.is_closed
    num_rows = sum(len(each) for each in keys.factors) + 1 if kind == IMPORTANCE else 0
    assert fake.peak_nbytes <= MEMORY + 8 * num_rows + 4096


@pytest.mark.parametrize("method", ["wait", "synchronize"])
@pytest.mark.parametrize("period", [1, 2])
def test_every_wait_is_needed(method, period):
    """Whichever of them is left out regularly, the fake device notices, or the result is another one."""
    layer = make_layer(np.random.default_rng(16), (BF16,) * 3, (3 * SPAN, SPAN, 2 * SPAN))
    masks = random_masks(np.random.default_rng(17), layer, Keys(layer), (BAND, RANDOM))
    masks.kinds[1], masks.columns[1] = RANKED, 64
    election, keys = random_election(np.random.default_rng(18), layer), Keys(layer)
    ranks = random_ranks(np.random.default_rng(19), layer, keys, 1)
    for phase in range(period):
        for call in (
            lambda device: check_threshold(layer, keys, ranks, device),
            lambda device: check_masks(layer, masks, election, (BF16,), device),
        ):
            with pytest.raises((AssertionError, _native.InputChangedError)):
                call(StreamedBackend(Careless(0, method, phase, period), MEMORY))


@pytest.mark.parametrize("columns", [1, 2, 31, 100, 1000, 1025])
def test_rows_of_any_length_are_ranked(columns):
    """Rows that neither bytes nor spans nor slices divide."""
    rng = np.random.default_rng(columns)
    num_rows = max(9, 600 // columns)
    layer = make_layer(rng, (BF16, F32, BF16), (columns * num_rows, columns))
    keys = Keys(layer, columns=[columns, columns])
    masks = random_masks(rng, layer, keys, [RANKED])
    check_masks(layer, masks, random_election(rng, layer), (BF16,))


def test_equal_keys_are_ranked_by_their_indices():
    rng = np.random.default_rng(11)
    deltas = [encode(rng.integers(0, 3, 6000) * 0.5, BF16) for _ in range(2)]
    layer = [[buffer_of(encode(np.zeros(6000), BF16), BF16), *(buffer_of(each, BF16) for each in deltas)]]
    masks = random_masks(rng, layer, Keys(layer, columns=[200]), [RANKED])
    check_masks(layer, masks, random_election(rng, layer), (BF16,))


def test_a_row_that_does_not_fit():
    layer = make_layer(np.random.default_rng(12), (BF16,) * 2, (3_000_000,))
    masks = empty_masks(layer, Keys(layer, columns=[3_000_000]))
    masks.kinds[:] = RANKED
    with pytest.raises(BackendError, match=r"too little device memory .* give --device-memory \d+MiB"):
        backend().layer_moments(layer_table_of(layer), masks)


def test_files(tmp_path):
    rng = np.random.default_rng(13)
    layer = make_layer(rng, (BF16, F32, F16), (700, SPAN + 1))
    masks = random_masks(rng, layer, Keys(layer), (ALL, BAND, RANDOM, RANKED))
    election = random_election(rng, layer)
    files = [
        [FileBuffer(tmp_path / f"{k}-{v}", buffer, 8 * v + 3) for v, buffer in enumerate(tensor)]
        for k, tensor in enumerate(layer)
    ]
    targets = [
        FileBuffer(tmp_path / f"{name}-{k}", Buffer(BF16, tensor[0].numel), 5)
        for name in ("cpu", "cuda")
        for k, tensor in enumerate(layer)
    ]
    expected = CPU.layer_elect(layer_table_of(files), masks, election, out_table_of(targets[:2]))
    device = backend()
    written = device.layer_elect(layer_table_of(files), masks, election, out_table_of(targets[2:]))
    assert [target.raw.tobytes() for target in targets[2:]] == [target.raw.tobytes() for target in targets[:2]]
    assert written.crcs.tolist() == expected.crcs.tolist()
    assert all(target.guards_intact() for target in targets)
    check_threshold(files, Keys(layer), random_ranks(rng, layer, Keys(layer), 2), device)
    for buffer in (*(each for tensor in files for each in tensor), *targets):
        buffer.close()


def test_values_that_change_between_two_passes_are_noticed(monkeypatch):
    numel = 5000
    layer = make_layer(np.random.default_rng(14), (F32,) * 2, (numel,))
    device = backend()
    count, num_calls = device._device.count_keys, 0

    def change(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:  # the second pass has been read; the third one will find that the model is the base
            layer[0][1].raw[:] = layer[0][0].raw
        count(*arguments)

    monkeypatch.setattr(device._device, "count_keys", change)
    ranks = np.full((1, 1, 1), numel // 2)
    with pytest.raises(_native.InputChangedError, match="second pass"):
        device.layer_threshold(layer_table_of(layer), *Keys(layer).arguments, ranks)
