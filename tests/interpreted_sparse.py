"""The sparse Triton kernels in Triton's interpreter, against the reference; run by test_triton_interpreted.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from metagpt_fast.backends.triton import TritonBackend
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.kernels.masks import number_of, random_numbers
from metagpt_fast.reference_masks import philox4x32

from .arrays import (
    Buffer,
    decode,
    differing,
    dtype_names,
    encode,
    make_layer,
    special_values,
)
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
    empty_masks,
    moments_scale,
    out_table_of,
    random_election,
    random_masks,
    random_ranks,
)

TRITON = TritonBackend("cpu")
KINDS = {"magnitude": MAGNITUDE, "variance": VARIANCE, "importance": IMPORTANCE}
CASES = [
    *(((BF16,) * 4, kind) for kind in KINDS),
    ((F32, F16, BF16), "importance"),
    ((F64, BF16, F32), "variance"),
    ((F64, BF16, F32), "magnitude"),
    ((F16,) * 2, "variance"),
    ((BF16,) * 9, "magnitude"),
]


def quantized(rng, dtypes, numel, *, has_base=True):
    """Few different values, so that most keys have many equals."""
    raws = [rng.integers(0, 3, numel) / 8 for _ in dtypes]
    return [encode(raw, dtype) for raw, dtype in zip(raws, dtypes, strict=True)]


@pytest.mark.parametrize(("dtypes", "kind"), CASES, ids=dtype_names)
def test_threshold(dtypes, kind):
    rng = np.random.default_rng(1)
    sizes = (0, 1, 17, 1100) if len(dtypes) < 9 else (300,)
    layer = make_layer(rng, dtypes, sizes)
    for raws in (quantized, special_values) if len(dtypes) < 9 else ():
        layer += make_layer(rng, dtypes, (260,), raws=raws)
    keys = Keys(layer, KINDS[kind])
    ranks = random_ranks(rng, layer, keys)
    table = layer_table_of(layer)
    with np.errstate(all="ignore"):
        found = TRITON.layer_threshold(table, *keys.arguments, ranks)
        nonzero = TRITON.layer_count_nonzero(table, *keys.arguments)
    expected = REFERENCE.layer_threshold(table, *keys.arguments, ranks)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(nonzero, REFERENCE.layer_count_nonzero(table, *keys.arguments))


@pytest.mark.parametrize(("dtypes", "kind"), CASES, ids=dtype_names)
def test_elections_and_moments(dtypes, kind):
    rng = np.random.default_rng(2)
    sizes = (0, 1, 17, 1100) if len(dtypes) < 9 else (300,)
    layer = make_layer(rng, dtypes, sizes, misalignments=(1,) if dtypes[0] is F16 else (0,))
    if kind == "magnitude":
        layer += make_layer(rng, dtypes, (200,), raws=special_values)
    keys = Keys(layer, KINDS[kind])
    masks = random_masks(rng, layer, keys, [ALL, BAND, RANDOM, RANKED, NEAR])
    election = random_election(rng, layer)
    table = layer_table_of(layer)
    for out_dtype in (dtypes[0], F64):
        out, expected = ([Buffer(out_dtype, tensor[0].numel) for tensor in layer] for _ in range(2))
        with np.errstate(all="ignore"):
            counts = TRITON.layer_elect(table, masks, election, out_table_of(out)).num_nonfinite
            want = REFERENCE.layer_elect(table, masks, election, out_table_of(expected)).num_nonfinite
        assert np.array_equal(counts, want)
        for k, (a, b) in enumerate(zip(out, expected, strict=True)):
            wrong = differing(a.raw, b.raw, out_dtype)[:3]
            values = decode(a.raw, out_dtype)[wrong], decode(b.raw, out_dtype)[wrong]
            assert not wrong.size, f"tensor {k}, masks {masks.kinds[k]}, at {wrong}: {values}"
            assert a.guards_intact()
    with np.errstate(all="ignore"):
        moments = TRITON.layer_moments(table, masks)
        want = REFERENCE.layer_moments(table, masks)
    assert np.array_equal(np.isfinite(moments), np.isfinite(want))
    with np.errstate(all="ignore"):
        error = np.abs(moments - want) / moments_scale(want)
    assert np.nanmax(np.where(np.isfinite(want), error, 0.0), initial=0.0) < 1e-12


@pytest.mark.parametrize("stream", [0, 1, 2**64 - 1, 0x123456789ABCDEF0])
def test_drop_masks_are_those_of_the_cpu_kernels(stream):
    """DARE: what is kept is the same, element for element."""
    layer = make_layer(np.random.default_rng(3), (F32,) * 2, (5001, 3))
    masks = empty_masks(layer, Keys(layer))
    masks.kinds[:] = RANDOM
    masks.probabilities[:] = 1 << 31
    masks.streams[:] = stream
    election = random_election(np.random.default_rng(4), layer, plain=True)
    table = layer_table_of(layer)
    out, expected = ([Buffer(F32, tensor[0].numel) for tensor in layer] for _ in range(2))
    TRITON.layer_elect(table, masks, election, out_table_of(out))
    CPU.layer_elect(table, masks, election, out_table_of(expected))
    assert all(np.array_equal(a.raw, b.raw) for a, b in zip(out, expected, strict=True))


@triton.jit
def _draw(stream_ptr, start_ptr, out_ptr, alone_ptr, BLOCK: tl.constexpr):
    start = tl.load(start_ptr)
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, random_numbers(tl.load(stream_ptr), start, BLOCK))
    tl.store(alone_ptr + offsets, number_of(tl.load(stream_ptr), start + offsets))


def test_random_numbers_past_32_bits_of_the_counter():
    """Elements 2^34 and on, whose counters need a second word."""
    start = 2**34 - 64
    out, alone = torch.zeros(128, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
    with np.errstate(all="ignore"):
        _draw[(1,)](torch.tensor([77]), torch.tensor([start]), out, alone, BLOCK=128)
    counters = np.arange(start // 4, start // 4 + 32, dtype=np.uint64)
    zero = np.zeros_like(counters)
    words = philox4x32(np.stack([counters & np.uint64(2**32 - 1), counters >> np.uint64(32), zero, zero]), 77)
    assert np.array_equal(out.numpy(), words.T.reshape(-1).astype(np.int64))
    assert np.array_equal(alone.numpy(), out.numpy())
