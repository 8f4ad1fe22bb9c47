"""The CUDA kernels' texts, run on the host thread by thread, against the CPU's kernels: every bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from metagpt_fast.backends.launch_tables import FP64, GENERAL, UNIFORM
from metagpt_fast.dtypes import BF16, F16, F32, F64

from . import cuda_emulation as cuda
from . import kernel_calls as cpu
from .arrays import (
    FLOATS,
    Buffer,
    bits_of,
    buffer_of,
    differing,
    dtype_names,
    encode,
    make_layer,
    random_bits,
    random_special,
    weights,
)
from .tools import cxx_compiler

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

# Around 16 bytes, 16 lanes, a stage of 256 bytes, and a block; two blocks of a warp with different sizes.
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 0, 8193, 2)
MIXED = [(BF16, F32), (F32, F16, BF16, BF16), (F32, F64), (F64, BF16, F16)]


def cycled(dtypes, num):
    return tuple(itertools.islice(itertools.cycle(dtypes), num))


def check_gram(layer, has_base=True, into=None):
    expected = cpu.gram(layer, has_base, into=None if into is None else into.copy())
    got = cuda.gram(layer, has_base, into=None if into is None else into.copy())
    wrong = (got.view(np.uint64) != expected.view(np.uint64)) & ~(np.isnan(got) & np.isnan(expected))
    assert not wrong.any(), (
        f"{has_base=} {[(t[0].numel, [str(b.dtype) for b in t]) for t in layer]} at {np.argwhere(wrong)[:5].tolist()}: "
        f"{got[wrong][:3]}, the CPU has {expected[wrong][:3]}"
    )
    return got


def check_merge(layer, coefficients, out_dtypes, has_base=True, shifts=(0,)):
    outs = [
        [
            Buffer(dtype, tensor[0].numel, shift * dtype.itemsize)
            for tensor, dtype, shift in zip(layer, itertools.cycle(out_dtypes), itertools.cycle(shifts), strict=False)
        ]
        for _ in range(2)
    ]
    table = np.broadcast_to(np.asarray(coefficients, np.float64), (len(layer), len(layer[0]) - has_base)).copy()
    expected_counts = cpu.merge(layer, table, outs[0], has_base)
    counts = cuda.merge(layer, table, outs[1], has_base)
    for tensor, want, got in zip(layer, *outs, strict=True):
        text = f"{has_base=} numel={want.numel} {[str(b.dtype) for b in tensor]} to {want.dtype}, {coefficients}"
        wrong = differing(got.raw, want.raw, want.dtype)
        bits = [bits_of(each.raw, each.dtype)[wrong[:5]] for each in (got, want)]
        assert wrong.size == 0, f"{text}: at {wrong[:5]}: {bits[0]}, the CPU has {bits[1]}"
        assert got.guards_intact(), text
    assert counts.tolist() == expected_counts.tolist()
    return outs[1]


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtypes", [(d,) for d in FLOATS] + MIXED, ids=dtype_names)
def test_gram(dtypes, num_models, has_base):
    sizes = SIZES if num_models in {3, 8} else SIZES[: 9 + num_models]
    layer = make_layer(
        np.random.default_rng(num_models), cycled(dtypes, num_models + has_base), sizes, has_base=has_base
    )
    check_gram(layer, has_base)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_gram_takes_the_kernel_that_is_meant(dtype):
    layer = make_layer(np.random.default_rng(0), (dtype,) * 4, [5000])
    assert cuda.kinds(layer) == {UNIFORM + dtype.code}
    shifted = make_layer(np.random.default_rng(0), (dtype,) * 4, [5000], misalignments=(dtype.itemsize, 0))
    assert cuda.kinds(shifted) == {GENERAL}
    assert np.array_equal(check_gram(layer), check_gram(shifted))
    assert cuda.kinds(make_layer(np.random.default_rng(0), (dtype, F64), [5])) == {FP64}


@pytest.mark.parametrize("numel", [262143, 262144, 600011])
def test_gram_of_several_spans(numel):
    rng = np.random.default_rng(3)
    layer = make_layer(rng, (BF16,) * 2, [70, numel])
    check_gram(layer, into=rng.normal(size=(2, 2, 2)))


@pytest.mark.parametrize("scale", [1e-18, 1e-13, 1e-11, 1e14, 1e18])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gram_of_blocks_outside_the_range(dtype, scale):
    """Some blocks are reliable, some are not, and one has a model that is the base's."""
    rng = np.random.default_rng(5)
    raws = []
    base = rng.normal(size=20000)
    for number in range(4):
        values = base + (rng.normal(size=20000) * 0.1 if number else 0)
        values[5000:13000] *= scale
        if number == 2:
            values[4096:8192] = (base * np.where(np.arange(20000) >= 5000, scale, 1))[4096:8192]
        raws.append(encode(values, dtype))
    check_gram([[buffer_of(raw, dtype) for raw in raws]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gram_of_special_values(dtype):
    rng = np.random.default_rng(6)
    raws = [[random_special(rng, dtype, 9000) for _ in range(3)], [random_bits(rng, dtype, 4100) for _ in range(3)]]
    check_gram([[buffer_of(raw, dtype) for raw in each] for each in raws])


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("dtypes", [(d,) for d in FLOATS] + MIXED, ids=dtype_names)
def test_merge(dtypes, num_models, has_base):
    rng = np.random.default_rng(num_models)
    operand_dtypes = cycled(dtypes, num_models + has_base)
    sizes = SIZES if num_models == 3 else SIZES[:14]
    layer = make_layer(rng, operand_dtypes, sizes, has_base=has_base)
    check_merge(layer, rng.normal(size=num_models), FLOATS, has_base)
    check_merge(layer, 0.3, [operand_dtypes[0]], has_base)


@pytest.mark.parametrize("raws", [random_special, random_bits], ids=["special", "bits"])
@pytest.mark.parametrize("coefficients", [(0.0, -0.0), (1 + 2.0**-40, 1e-40), (1e39, 1e-60), (-0.7, 1 / 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_of_special_values(dtype, coefficients, raws):
    rng = np.random.default_rng(8)
    for has_base in (True, False):
        layer = [[buffer_of(raws(rng, dtype, 3000), dtype) for _ in range(2 + has_base)] for _ in FLOATS]
        check_merge(layer, coefficients, FLOATS, has_base)


@pytest.mark.parametrize("shift", [1, 3])
def test_merge_of_what_16_byte_loads_cannot_take(shift):
    layer = make_layer(np.random.default_rng(9), (BF16,) * 4, [17, 5000], misalignments=(0, 2 * shift))
    check_merge(layer, (0.2, 0.3, 0.4), [BF16, F32])
    aligned = make_layer(np.random.default_rng(9), (BF16,) * 4, [17, 5000])
    assert cuda.kinds(aligned, [Buffer(BF16, 17), Buffer(BF16, 5000)]) == {UNIFORM + BF16.code}
    check_merge(aligned, (0.2, 0.3, 0.4), [BF16, F32], shifts=(shift,))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_merge_into_an_operand(dtype):
    layer = make_layer(np.random.default_rng(10), (dtype,) * 4, [9000])
    expected = check_merge(layer, (0.5, 0.2, 0.1), [dtype])[0].raw.copy()
    cuda.merge(layer, np.array([[0.5, 0.2, 0.1]]), [layer[0][2]])
    assert differing(layer[0][2].raw, expected, dtype).size == 0


def test_random_layers():
    """Sizes, dtypes and numbers of models of every kind in one layer's launch."""
    for seed in range(12):
        rng = np.random.default_rng(100 + seed)
        num_operands, num_tensors = int(rng.integers(2, 7)), int(rng.integers(1, 9))
        has_base = bool(rng.integers(2))
        layer = []
        for _ in range(num_tensors):
            dtypes = [FLOATS[int(rng.integers(4))]] * num_operands
            if rng.random() < 0.3:
                dtypes = [FLOATS[int(i)] for i in rng.integers(0, 4, num_operands)]
            numel = int(rng.integers(0, 9000))
            layer.append([buffer_of(raw, d) for raw, d in zip(weights(rng, dtypes, numel), dtypes, strict=True)])
        check_gram(layer, has_base)
        check_merge(layer, rng.normal(size=num_operands - has_base), rng.permutation(np.array(FLOATS)), has_base)
