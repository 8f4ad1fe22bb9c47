"""On a GPU: the CPU's bits from the real kernels, through the real ring. Skipped where there is none."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from metagpt_fast.backends import streamed_threshold, streaming
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.cuda_device import CudaDevice, list_devices
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.backends.tables import output_table
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.errors import BackendError

from .arrays import (
    FLOATS,
    Buffer,
    bit_patterns,
    buffer_of,
    encode,
    make_layer,
    random_bits,
    random_special,
    special_values,
    weights,
)
from .kernel_calls import dtype_code, layer_table_of
from .sparse_calls import IMPORTANCE, MAGNITUDE, VARIANCE, Keys, random_election, random_masks, random_ranks
from .test_cuda_sparse import ALL_KINDS, check_masks, check_threshold


def reason_against() -> str | None:
    try:
        list_devices()
    except BackendError as error:
        return str(error)
    return None


REASON = reason_against()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]

SIZES = (0, 1, 3, 8, 9, 17, 63, 129, 4095, 4096, 4097, 0, 8193, 262144, 600_011, 2)
MIXED = [(BF16, F32), (F32, F16, BF16, BF16), (F32, F64), (F64, BF16, F16)]


@pytest.fixture(scope="module")
def backend():
    opened = StreamedBackend(CudaDevice(0), 128 << 20)
    yield opened
    opened.close()


@pytest.fixture(params=[8 << 20, 1], ids=["slices", "single spans"])
def slice_nbytes(request, monkeypatch):
    monkeypatch.setattr(streaming, "_SLICE_NBYTES", request.param)


def check(backend, layer, coefficients, out_dtypes, has_base=True):
    table = layer_table_of(layer, has_base)
    results = []
    for each in (CpuBackend(), backend):
        gram = np.full((len(layer), len(layer[0]), len(layer[0])), 0.5)
        each.layer_gram(table, gram)
        outs = [Buffer(out_dtypes[k % len(out_dtypes)], tensor[0].numel, k % 5) for k, tensor in enumerate(layer)]
        places = output_table([(out.address, out.descriptor, dtype_code(out)) for out in outs])
        counts = each.layer_merge(table, coefficients, places).num_nonfinite
        results.append((gram, outs, counts))
    (gram, outs, counts), (their_gram, their_outs, their_counts) = results
    same = (gram.view(np.uint64) == their_gram.view(np.uint64)) | (np.isnan(gram) & np.isnan(their_gram))
    assert same.all(), np.argwhere(~same)[:5]
    for out, theirs in zip(outs, their_outs, strict=True):
        assert differing_bits(out, theirs).size == 0
        assert theirs.guards_intact()
    assert counts.tolist() == their_counts.tolist()


def differing_bits(a, b):
    from .arrays import differing

    return differing(a.raw, b.raw, a.dtype)


@pytest.mark.usefixtures("slice_nbytes")
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtypes", [(d,) for d in FLOATS] + MIXED, ids=str)
def test_layers(backend, dtypes, num_models, has_base):
    rng = np.random.default_rng(num_models)
    operand_dtypes = tuple(dtypes[i % len(dtypes)] for i in range(num_models + has_base))
    layer = make_layer(rng, operand_dtypes, SIZES, has_base=has_base, misalignments=(0, 1, 2, 5))
    check(backend, layer, rng.normal(size=(len(SIZES), num_models)), FLOATS, has_base)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("raws", [random_special, random_bits, weights], ids=["special", "bits", "weights"])
def test_values(backend, dtype, raws):
    rng = np.random.default_rng(5)
    for pair in ((0.0, -0.0), (1 + 2.0**-40, 1e-40), (1e39, 1e-60), (-0.7, 1 / 3)):
        layer = []
        for numel in (9000, 4096, 77, 300_000):
            if raws is weights:
                tensor = weights(rng, (dtype,) * 3, numel)
            else:
                tensor = [raws(rng, dtype, numel) for _ in range(3)]
            layer.append([buffer_of(raw, dtype) for raw in tensor])
        check(backend, layer, np.tile(pair, (len(layer), 1)), FLOATS)


@pytest.mark.parametrize("scale", [1e-18, 1e-11, 1e14, 1e18])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_blocks_outside_the_range(backend, dtype, scale):
    rng = np.random.default_rng(6)
    base = rng.normal(size=20000)
    tensors = []
    for number in range(4):
        values = base + (rng.normal(size=20000) * 0.1 if number else 0)
        values[5000:13000] *= scale
        if number == 2:
            values[:4096] = base[:4096]
        tensors.append(buffer_of(encode(values, dtype), dtype))
    check(backend, [tensors], np.array([[0.5, 0.2, 0.1]]), [dtype])


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_a_large_layer(backend, dtype):
    layer = make_layer(np.random.default_rng(7), (dtype,) * 4, [20_000_003, 17, 5_000_000])
    check(backend, layer, np.tile([0.5, 0.3, 0.2], (3, 1)), [dtype])


@pytest.mark.usefixtures("slice_nbytes")
@pytest.mark.parametrize("kind", [MAGNITUDE, VARIANCE, IMPORTANCE])
@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (F32,) * 2, (F32, F16, BF16, BF16), (F64, BF16, F16)], ids=str)
def test_sparse_layers(backend, monkeypatch, dtypes, kind):
    monkeypatch.setattr(streamed_threshold, "_LEAST_COUNTED", 5000)
    rng = np.random.default_rng(9)
    layer = make_layer(rng, dtypes, SIZES, misalignments=(0, 1, 2, 5))
    keys = Keys(layer, kind)
    check_threshold(layer, keys, random_ranks(rng, layer, keys), backend)
    masks = random_masks(rng, layer, keys, ALL_KINDS)
    check_masks(layer, masks, random_election(rng, layer), FLOATS, backend)


@pytest.mark.parametrize("raws", [special_values, bit_patterns])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sparse_layers_of_special_values(backend, dtype, raws):
    rng = np.random.default_rng(10)
    layer = make_layer(rng, (dtype,) * 4, (9000, 4096, 77), raws=raws)
    for mask in ALL_KINDS:
        masks = random_masks(rng, layer, Keys(layer), [mask])
        check_masks(layer, masks, random_election(rng, layer), FLOATS, backend)


def test_too_much_memory_is_an_error_that_leaves_the_device_usable(backend):
    with pytest.raises(BackendError, match="memory"):
        StreamedBackend(CudaDevice(0), 1 << 60)
    layer = make_layer(np.random.default_rng(8), (BF16,) * 2, [5000])
    check(backend, layer, np.array([[0.5]]), [BF16])


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pydantic", "yaml", "safetensors")),
    reason="the package's dependencies are not installed",
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "layer", "io": "pread"},
        {"method": "linear"},
        {"method": "ties"},
        {"method": "dare_ties", "io": "pread"},
        {"method": "della"},
        {"method": "sce"},
    ],
    ids=str,
)
def test_merges_of_files(tmp_path, settings):
    import metagpt_fast as mf

    from .checkpoints import random_states, tensor_bytes, write_family

    shapes = {"layers.0.a": (300, 7), "layers.0.large": (300, 10_001), "layers.1.b": (64, 65), "head": (51, 40)}
    states = random_states(21, [(BF16, BF16, F32, F64), (BF16,), (F16, F32)], shapes)
    base, models = write_family(tmp_path / "family", states, num_shards=2, misalignment=5)
    mf.merge(base, models, tmp_path / "cpu", **settings)
    report = mf.merge(base, models, tmp_path / "cuda", device="cuda", **settings)
    assert report.device.startswith("cuda:0")
    assert tensor_bytes(tmp_path / "cuda") == tensor_bytes(tmp_path / "cpu")
