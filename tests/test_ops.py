"""The public kernels on arrays of NumPy, ml_dtypes and torch, against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from metagpt_fast import _native, ops, reference
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import FLOATS, differing, dtype_names, weights
from .tolerances import GRAM_RANDOM, gram_error

NUMPY_DTYPES = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16, F64: np.float64}
TORCH_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, F64: torch.float64}
SHAPES = [(3, 5), (), (0, 4), (17, 241), (1,)]


def numpy_array(raw, dtype, shape):
    return raw.view(NUMPY_DTYPES[dtype]).reshape(shape)


def torch_tensor(raw, dtype, shape):
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    raw_of(tensor)[:] = raw
    return tensor


def raw_of(array):
    if isinstance(array, torch.Tensor):
        return array.reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.fixture(params=[numpy_array, torch_tensor])
def make_array(request):
    return request.param


def make_arrays(make_array, dtypes):
    """Base arrays [K], models' arrays [T][K] and the same as the reference takes it, [K][V]."""
    rng = np.random.default_rng(51)
    layer = [list(zip(weights(rng, dtypes, int(np.prod(shape))), dtypes, strict=True)) for shape in SHAPES]
    by_operand = [
        [make_array(*tensor[v], shape) for tensor, shape in zip(layer, SHAPES, strict=True)] for v in range(len(dtypes))
    ]
    return by_operand[0], by_operand[1:], layer


DTYPES = [(d,) * 3 for d in FLOATS] + [(BF16, F32, F16, F64)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_gram(make_array, dtypes):
    base, models, layer = make_arrays(make_array, dtypes)
    gram = ops.layer_gram(base, models)
    assert gram.shape == (len(SHAPES), len(dtypes), len(dtypes))
    assert gram.dtype == np.float64
    assert gram_error(gram, reference.layer_gram(layer, True)) <= GRAM_RANDOM
    without_base = ops.layer_gram(None, [base, *models])
    assert gram_error(without_base, reference.layer_gram(layer, False)) <= GRAM_RANDOM


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_merge(make_array, dtypes):
    base, models, layer = make_arrays(make_array, dtypes)
    rows = np.random.default_rng(52).normal(0.3, 0.2, (len(SHAPES), len(models)))
    for coefficients in (rows, rows[0]):
        merged = ops.layer_merge(base, models, coefficients)
        expected = reference.layer_merge(layer, np.zeros_like(rows) + coefficients, dtypes[:1] * len(SHAPES), True)
        for array, like, want in zip(merged, base, expected, strict=True):
            assert type(array) is type(like)
            assert array.dtype == like.dtype
            assert array.shape == like.shape
            assert differing(raw_of(array), want, dtypes[0]).size == 0


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_merge_into_out(make_array, out_dtype):
    base, models, layer = make_arrays(make_array, (BF16, F32, BF16))
    rows = np.full((len(SHAPES), 2), 0.4)
    out = [
        make_array(np.full(int(np.prod(shape)) * out_dtype.itemsize, 0xA5, np.uint8), out_dtype, shape)
        for shape in SHAPES
    ]
    returned = ops.layer_merge(base, models, rows, out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    expected = reference.layer_merge(layer, rows, [out_dtype] * len(SHAPES), True)
    for array, want in zip(out, expected, strict=True):
        assert differing(raw_of(array), want, out_dtype).size == 0


def test_merge_in_place(make_array):
    base, models, layer = make_arrays(make_array, (BF16,) * 3)
    rows = np.full((len(SHAPES), 2), 0.4)
    expected = reference.layer_merge(layer, rows, [BF16] * len(SHAPES), True)
    ops.layer_merge(base, models, rows, base)
    for array, want in zip(base, expected, strict=True):
        assert differing(raw_of(array), want, BF16).size == 0


def test_threads_change_no_bits_and_stay_with_the_call(make_array):
    base, models, _ = make_arrays(make_array, (BF16,) * 3)
    before = _native.num_threads()
    one, three = (ops.layer_gram(base, models, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one, three)
    merged = [ops.layer_merge(base, models, [0.3, 0.3], threads=n) for n in (1, 3)]
    assert all(np.array_equal(raw_of(a), raw_of(b)) for a, b in zip(*merged, strict=True))
    assert _native.num_threads() == before
