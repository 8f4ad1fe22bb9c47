"""Sums over masked task vectors against NumPy, on every instruction set and number of threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import BLOCK_SIZES, SMALL_SIZES, dtype_names, make_layer, special_values
from .kernel_calls import layer_table_of
from .sparse_calls import (
    ALL,
    BAND,
    CPU,
    IMPORTANCE,
    MAGNITUDE,
    NEAR,
    RANDOM,
    RANKED,
    REFERENCE,
    VARIANCE,
    Keys,
    every_setting,
    moments_scale,
    random_masks,
)
from .test_layer_threshold import LARGE
from .tolerances import MOMENTS

DTYPES = [(BF16,) * 4, (F32,) * 2, (F64, BF16, F32), (F32, BF16, F16, BF16, F32, BF16)]
ALL_KINDS = (ALL, BAND, RANDOM, RANKED, NEAR)


def check(layer, masks):
    """Compare with the reference; all settings have to give the same bits."""
    expected = REFERENCE.layer_moments(layer_table_of(layer), masks)
    first = None
    for setting in every_setting():
        moments = CPU.layer_moments(layer_table_of(layer), masks)
        first = moments if first is None else first
        np.testing.assert_array_equal(moments, first, err_msg=setting)  # the same bits, NaN included
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(first), finite)
    np.testing.assert_array_equal(first[..., [0, 5]], expected[..., [0, 5]])  # counts
    with np.errstate(all="ignore"):
        error = np.abs(first - expected) / moments_scale(expected)
    assert np.max(error[finite], initial=0.0) <= MOMENTS


@pytest.mark.parametrize("kind", [MAGNITUDE, VARIANCE, IMPORTANCE])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_sizes_dtypes_and_kinds_of_masks(dtypes, kind):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, dtypes, (*SMALL_SIZES, *BLOCK_SIZES), misalignments=(0, 1, 2, 3))
    keys = Keys(layer, kind)
    check(layer, random_masks(rng, layer, keys, ALL_KINDS))


@pytest.mark.parametrize("mask", ALL_KINDS)
def test_tensors_that_threads_share(mask):
    rng = np.random.default_rng(2)
    layer = make_layer(rng, (BF16,) * 3, (LARGE,))
    keys = Keys(layer)
    check(layer, random_masks(rng, layer, keys, [mask]))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_special_values(dtypes):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, dtypes, (700, 33, 5), raws=special_values)
    keys = Keys(layer)
    check(layer, random_masks(rng, layer, keys, ALL_KINDS))


@pytest.mark.parametrize("mask", [BAND, RANDOM, RANKED])
def test_the_bits_that_are_kept(mask):
    """With room for bits the sums are the same, and the bits are the mask; those past the last element are 0."""
    rng = np.random.default_rng(4)
    layer = make_layer(rng, (BF16,) * 3, (1, 63, 64, 65, 4097, 262145))
    keys = Keys(layer)
    masks = random_masks(rng, layer, keys, [mask])
    plain = CPU.layer_moments(layer_table_of(layer), masks)
    for setting in every_setting():
        room = [[np.full(-(-tensor[0].numel // 64), 2**64 - 1, np.uint64) for _ in range(2)] for tensor in layer]
        bits = np.array([[each.ctypes.data for each in row] for row in room], np.uint64)
        moments = CPU.layer_moments(layer_table_of(layer), replace(masks, bits=bits))
        np.testing.assert_array_equal(moments, plain, err_msg=setting)
        kept = [[int(np.unpackbits(each.view(np.uint8)).sum()) for each in row] for row in room]
        assert kept == plain[..., 0].astype(int).tolist(), setting
