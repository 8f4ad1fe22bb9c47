"""The kernels of columns for CUDA, run on the host through the streamed backend, against the CPU's: every bit."""

from __future__ import annotations

import numpy as np
import pytest

from metagpt_fast.backends import streaming
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import FLOATS, differing, dtype_names, make_layer, make_out, special_values
from .fake_device import FakeDevice
from .kernel_calls import layer_table_of
from .sparse_calls import out_table_of
from .test_column_kernels import layer_of, random_coefficients
from .tools import cxx_compiler

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

MEMORY = 48 << 20
DTYPES = [(BF16,) * 4, (F32,) * 3, (F16,) * 2, (BF16, F32, F16), (F32, F64, BF16)]
# Blocks of 256 rows that end inside of slices, at their ends, and not at all.
SHAPES = [(0, 5), (1, 1), (70, 1), (9, 3), (255, 40), (256, 30), (257, 12), (1025, 65), (1, 1000), (3, 2000)]
LARGE_SHAPES = [(1100, 200), (3, 4), (30_000, 2), (2, 20_001)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(streaming, "_SLICE_NBYTES", 50_000)


def check(layer, columns, *, has_base=True, seed=1, device=None):
    rng = np.random.default_rng(seed)
    table, numbers = layer_table_of(layer, has_base), np.array(columns, np.int64)
    device = StreamedBackend(FakeDevice(seed), MEMORY) if device is None else device
    size = table.num_operands
    totals = [rng.normal(size=(c, size, size)) for c in columns]
    totals = [each + each.transpose(0, 2, 1) for each in totals]
    coefficients = random_coefficients(rng, columns, size - has_base)
    results = []
    for backend in (CpuBackend(), device):
        grams = backend.column_gram(table, numbers)
        into = [each.copy() for each in totals]
        added = backend.column_gram(table, numbers, into)
        assert all(a is b for a, b in zip(added, into, strict=True))
        out = make_out(layer, (*FLOATS, layer[0][0].dtype), (0, 3, 1))
        counts = backend.column_merge(table, numbers, coefficients, out_table_of(out)).num_nonfinite
        results.append((grams, into, out, counts.tolist()))
    (grams, into, out, counts), (their_grams, their_into, their_out, their_counts) = results
    for k, shapes in enumerate(zip(grams + into, their_grams + their_into, strict=True)):
        assert np.array_equal(*shapes, equal_nan=True), (k, np.argwhere(shapes[0] != shapes[1])[:3])
    for k, (want, got) in enumerate(zip(out, their_out, strict=True)):
        assert not differing(got.raw, want.raw, got.dtype).size, k
        assert got.guards_intact()
    assert their_counts == counts


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_shapes_and_dtypes(dtypes, has_base):
    layer, columns = layer_of(np.random.default_rng(1), dtypes, SHAPES, has_base=has_base)
    check(layer, columns, has_base=has_base)


@pytest.mark.parametrize("seed", range(4))
def test_matrices_in_pieces_in_any_order(seed):
    layer, columns = layer_of(np.random.default_rng(2), (BF16,) * 3, LARGE_SHAPES)
    device = FakeDevice(seed)
    check(layer, columns, seed=seed, device=StreamedBackend(device, MEMORY))
    assert device.num_launches > 8


def test_special_values():
    for dtype in FLOATS:
        layer = make_layer(np.random.default_rng(3), (dtype,) * 3, (700, 33), raws=special_values)
        check(layer, [7, 33])
