"""The election against the reference, bit for bit, on every instruction set and number of threads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import (
    BLOCK_SIZES,
    FLOATS,
    SMALL_SIZES,
    bit_patterns,
    decode,
    differing,
    dtype_names,
    make_layer,
    make_out,
    special_values,
)
from .arrays import nonfinite as is_nonfinite
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
    REFERENCE,
    VARIANCE,
    Keys,
    every_setting,
    out_table_of,
    random_election,
    random_masks,
)
from .test_layer_threshold import LARGE

DTYPES = [
    *((dtype,) * num for dtype, num in ((BF16, 2), (BF16, 3), (BF16, 4), (F32, 5), (F16, 6), (F64, 3))),
    *((F64, BF16, F32), (F32, BF16, F16, BF16, F32), (BF16, F32)),
]
ALL_KINDS = (ALL, BAND, RANDOM, RANKED, NEAR)


def check(layer, masks, election, out):
    """Compare every setting with the reference: each bit of the output, its guards, the non-finite counts."""
    expected = make_out(layer, [buffer.dtype for buffer in out])
    REFERENCE.layer_elect(layer_table_of(layer), masks, election, out_table_of(expected))
    for setting in every_setting():
        for buffer in out:
            buffer.poison()
        counts = CPU.layer_elect(layer_table_of(layer), masks, election, out_table_of(out)).num_nonfinite
        for k, (buffer, want) in enumerate(zip(out, expected, strict=True)):
            text = f"{setting} tensor {k} of {buffer.numel}, {[str(b.dtype) for b in layer[k]]} -> {buffer.dtype}"
            wrong = differing(buffer.raw, want.raw, buffer.dtype)[:3]
            shown = decode(buffer.raw, buffer.dtype)[wrong], decode(want.raw, buffer.dtype)[wrong]
            assert not wrong.size, f"{text}: at {wrong}: got, expected {shown}; kinds {masks.kinds[k]}"
            assert buffer.guards_intact(), f"{text}: wrote outside of the output"
            assert counts[k] == np.count_nonzero(is_nonfinite(want.raw, buffer.dtype)), text


@pytest.mark.parametrize("kind", [MAGNITUDE, VARIANCE, IMPORTANCE])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_names)
def test_sizes_dtypes_and_kinds_of_masks(dtypes, kind):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, dtypes, (*SMALL_SIZES, *BLOCK_SIZES), misalignments=(0, 1, 2, 3))
    keys = Keys(layer, kind)
    masks = random_masks(rng, layer, keys, ALL_KINDS)
    check(layer, masks, random_election(rng, layer), make_out(layer, (dtypes[0], BF16, F16, F32, F64), (0, 3, 1)))


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("mask", ALL_KINDS)
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5])
def test_numbers_of_models(num_models, mask, is_plain):
    """The paths in registers are those for few models, masks of one kind, and no factor of its own."""
    rng = np.random.default_rng(2)
    layer = make_layer(rng, (BF16,) * (1 + num_models), (1, 5, 63, 513, 700, 4097))
    election = replace(random_election(rng, layer, plain=is_plain), uniques=np.ones((len(layer), num_models)))
    if is_plain:
        election.floors[:] = 0
    keys = Keys(layer)
    check(layer, random_masks(rng, layer, keys, [mask]), election, make_out(layer, (BF16, F32, F64)))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("raws", [special_values, bit_patterns])
@pytest.mark.parametrize("dtypes", [(BF16,) * 2, (F32,) * 4, (F64, F16, BF16)], ids=dtype_names)
def test_special_values(dtypes, raws, out_dtype):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, dtypes, (700, 700, 700, 33, 5), raws=raws)
    for mask in ALL_KINDS:
        keys = Keys(layer)
        masks = random_masks(rng, layer, keys, [mask])
        for is_plain in (False, True):
            check(layer, masks, random_election(rng, layer, plain=is_plain), make_out(layer, [out_dtype]))


@pytest.mark.parametrize("mask", ALL_KINDS)
def test_tensors_that_threads_share(mask):
    rng = np.random.default_rng(4)
    layer = make_layer(rng, (BF16,) * 4, (LARGE,))
    keys = Keys(layer)
    check(layer, random_masks(rng, layer, keys, [mask]), random_election(rng, layer), make_out(layer, [BF16]))


@pytest.mark.parametrize("mask", [BAND, RANDOM, RANKED])
def test_masks_that_layer_moments_left(mask):
    rng = np.random.default_rng(5)
    layer = make_layer(rng, (BF16,) * 4, (1, 63, 64, 65, 700, 4097, 262145))
    keys = Keys(layer)
    masks = random_masks(rng, layer, keys, [mask])
    room = [[np.full(-(-tensor[0].numel // 64), 2**64 - 1, np.uint64) for _ in range(3)] for tensor in layer]
    bits = np.array([[each.ctypes.data for each in row] for row in room], np.uint64)
    CPU.layer_moments(layer_table_of(layer), replace(masks, bits=bits))
    # What the masks are made of is gone; only the bits can tell.
    election = random_election(rng, layer)
    out, expected = make_out(layer, [BF16]), make_out(layer, [BF16])
    REFERENCE.layer_elect(layer_table_of(layer), masks, election, out_table_of(expected))
    for setting in every_setting():
        forgotten = replace(masks, keys=np.zeros_like(masks.keys), streams=np.zeros_like(masks.streams), bits=bits)
        CPU.layer_elect(layer_table_of(layer), forgotten, election, out_table_of(out))
        for buffer, want in zip(out, expected, strict=True):
            assert not differing(buffer.raw, want.raw, BF16).size, setting


def test_files(tmp_path):
    rng = np.random.default_rng(6)
    layer = make_layer(rng, (BF16, F32, F16), (700, 262145))
    keys = Keys(layer)
    masks = random_masks(rng, layer, keys, [ALL, BAND, RANDOM])
    election = random_election(rng, layer)
    files = [
        [FileBuffer(tmp_path / f"{k}-{v}", buffer, 8 * v + 3) for v, buffer in enumerate(tensor)]
        for k, tensor in enumerate(layer)
    ]
    targets = [FileBuffer(tmp_path / f"out-{k}", tensor[0], 5) for k, tensor in enumerate(layer)]
    expected = make_out(layer, [BF16])
    REFERENCE.layer_elect(layer_table_of(layer), masks, election, out_table_of(expected))
    try:
        for setting in every_setting():
            CPU.layer_elect(layer_table_of(files), masks, election, out_table_of(targets))
            for target, want in zip(targets, expected, strict=True):
                assert not differing(target.raw, want.raw, BF16).size, setting
                assert target.guards_intact()
    finally:
        for buffer in (*itertools.chain(*files), *targets):
            buffer.close()


@given(
    st.integers(1, 1200),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([MAGNITUDE, VARIANCE, IMPORTANCE]),
    st.sampled_from(FLOATS),
)
@settings(max_examples=25, deadline=None)
def test_anything(numel, num_models, seed, kind, out_dtype):
    rng = np.random.default_rng(seed)
    dtypes = [FLOATS[i] for i in rng.integers(0, 4, 1 + num_models)]
    layer = make_layer(rng, dtypes, (numel,), misalignments=tuple(rng.integers(0, 9, 3).tolist()))
    keys = Keys(layer, kind)
    masks = random_masks(rng, layer, keys, ALL_KINDS)
    check(layer, masks, random_election(rng, layer), make_out(layer, [out_dtype], (int(rng.integers(0, 9)),)))
