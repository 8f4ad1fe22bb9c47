"""The selection of an element by rank against a sort, on every instruction set and number of threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import (
    SMALL_SIZES,
    bit_patterns,
    buffer_of,
    dtype_names,
    encode,
    make_layer,
    special_values,
)
from .kernel_calls import layer_table_of
from .sparse_calls import (
    CPU,
    IMPORTANCE,
    MAGNITUDE,
    REFERENCE,
    VARIANCE,
    Keys,
    every_setting,
    random_ranks,
)

KINDS = (MAGNITUDE, VARIANCE, IMPORTANCE)
LARGE = 524_291  # three of the pieces that threads take
DTYPES = [(BF16,) * 4, (F16,) * 3, (F32,) * 2, (F64, BF16, F32), (F32, BF16, F16, BF16, F32), (BF16, F32)]


def check(layer, keys, ranks):
    """Compare every setting with the reference: keys, indices, and how many keys are not 0."""
    table = layer_table_of(layer)
    expected = REFERENCE.layer_threshold(table, *keys.arguments, ranks)
    nonzero = REFERENCE.layer_count_nonzero(table, *keys.arguments)
    for setting in every_setting():
        found, where = CPU.layer_threshold(table, *keys.arguments, ranks)
        np.testing.assert_array_equal(found, expected[0], err_msg=setting)
        np.testing.assert_array_equal(where, expected[1], err_msg=setting)
        np.testing.assert_array_equal(CPU.layer_count_nonzero(table, *keys.arguments), nonzero, err_msg=setting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_sizes_and_dtypes(dtypes, kind):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, dtypes, (*SMALL_SIZES, 4097, 1000), misalignments=(0, 1, 2, 3))
    keys = Keys(layer, kind)
    check(layer, keys, random_ranks(rng, layer, keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raws", [special_values, bit_patterns])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_special_values(dtypes, raws, kind):
    rng = np.random.default_rng(2)
    layer = make_layer(rng, dtypes, (700, 33, 5), raws=raws)
    keys = Keys(layer, kind)
    check(layer, keys, random_ranks(rng, layer, keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_tensors_that_threads_share(dtype, kind):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, (dtype,) * 3, (LARGE, 65537, 65536))
    keys = Keys(layer, kind)
    check(layer, keys, random_ranks(rng, layer, keys, 4))


def misleading(name, rng, numel):
    """Return a task vector of which an evenly spread sample says something wrong, or nothing."""
    values = np.zeros(numel)
    if name == "few values":
        values = rng.integers(0, 3, numel).astype(np.float64)
    elif name == "one value":
        values[:] = 0.5
    elif name == "at the end":
        values[-numel // 300 :] = rng.normal(size=len(values[-numel // 300 :]))
    elif name == "one element":
        values[numel // 2 + 7] = 3.0
    elif name == "ascending":
        values = np.arange(numel) / numel
    elif name == "every 1024th":
        values[::1024] = 1 + np.arange(len(values[::1024]))
    elif name == "mostly nan":
        values = np.where(rng.random(numel) < 0.9, np.nan, rng.normal(size=numel))
    return encode(values, F32)


@pytest.mark.parametrize(
    "name", ["few values", "one value", "at the end", "one element", "ascending", "every 1024th", "mostly nan"]
)
def test_what_a_sample_misses(name):
    rng = np.random.default_rng(4)
    numel = 300_007
    layer = [[buffer_of(encode(np.zeros(numel), F32), F32), buffer_of(misleading(name, rng, numel), F32)]]
    ranks = np.array([0, 1, numel // 1024, numel // 300, numel // 3, numel // 2, numel - 2, numel - 1, -1])
    check(layer, Keys(layer), ranks.reshape(1, 1, -1).astype(np.int64))


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_any_rank_among_any_number_of_equals(numel, num_values, seed, kind):
    rng = np.random.default_rng(seed)
    values = [rng.integers(-num_values, num_values + 1, numel) * 0.25 for _ in range(3)]
    layer = [[buffer_of(encode(each, BF16), BF16) for each in values]]
    keys = Keys(layer, kind)
    check(layer, keys, random_ranks(rng, layer, keys, 5))


def test_ranks_are_a_permutation():
    """All ranks of a tensor give all of its elements, each once, in descending order."""
    rng = np.random.default_rng(5)
    numel = 300
    layer = [[buffer_of(encode(np.round(rng.normal(size=numel) * 4), BF16), BF16) for _ in range(2)]]
    ranks = np.arange(numel, dtype=np.int64).reshape(1, 1, -1)
    found, where = CPU.layer_threshold(layer_table_of(layer), *Keys(layer).arguments, ranks)
    assert sorted(where.ravel().tolist()) == list(range(numel))
    places = list(zip((-found.astype(np.int64)).ravel().tolist(), where.ravel().tolist(), strict=True))
    assert all(first < second for first, second in itertools.pairwise(places))


@pytest.mark.parametrize("rank", [-2, 10, 2**40])
def test_ranks_outside_are_refused(rank):
    layer = make_layer(np.random.default_rng(6), (F32, F32), (10,))
    with pytest.raises(ValueError, match="rank"):
        CPU.layer_threshold(layer_table_of(layer), *Keys(layer).arguments, np.full((1, 1, 1), rank, np.int64))
