"""The dense Triton kernels in Triton's interpreter, against the reference; run by test_triton_interpreted.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from metagpt_fast import reference
from metagpt_fast.backends.triton import TritonBackend
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import (
    FLOATS,
    Buffer,
    EdgeBuffer,
    bit_patterns,
    buffer_of,
    decode,
    differing,
    dtype_names,
    encode,
    halfway,
    make_layer,
    nonfinite,
    special_values,
    weights,
)
from .kernel_calls import layer_table_of, operands
from .sparse_calls import out_table_of
from .tolerances import GRAM_BOUND, GRAM_F64, GRAM_RANDOM, gram_error

TRITON = TritonBackend("cpu")
COEFFICIENTS = [0.0, -0.0, 1.0, -1.0, 1 / 3, 0.3, -0.7, 1 + 2.0**-40, 1e-7, 1e-40, 1e30, 1e39]
# A tile is 2048 elements in most of these: none, one, less than a tile, a tile, more.
SIZES = (0, 1, 17, 2048, 2049)
DTYPE_CYCLES = [(BF16,), (F16,), (F32,), (F64,), (BF16, F32), (F32, F16, BF16), (F64, BF16, F32)]


def check_merge(layer, coefficients, out, has_base=True):
    coefficients = np.ones((len(layer), len(layer[0]) - has_base)) * coefficients
    expected = reference.layer_merge(operands(layer), coefficients, [b.dtype for b in out], has_base)
    for buffer in out:
        buffer.poison()
    with np.errstate(all="ignore"):
        counts = TRITON.layer_merge(layer_table_of(layer, has_base), coefficients, out_table_of(out)).num_nonfinite
    for tensor, buffer, want, count in zip(layer, out, expected, counts, strict=True):
        wrong = differing(buffer.raw, want, buffer.dtype)[:3]
        shown = [(int(i), decode(buffer.raw, buffer.dtype)[i], decode(want, buffer.dtype)[i]) for i in wrong]
        assert not shown, f"{[str(b.dtype) for b in tensor]} -> {buffer.dtype}, numel={buffer.numel}: {shown}"
        assert buffer.guards_intact(), "wrote outside of the output"
        assert count == np.count_nonzero(nonfinite(want, buffer.dtype))


@pytest.mark.parametrize(
    ("dtypes", "num_models"),
    [
        *((cycle, 3) for cycle in DTYPE_CYCLES),
        *(((BF16,), n) for n in (1, 2, 4, 5, 8)),
        ((F32, F64), 1),
        ((F16, F32), 4),
    ],
    ids=dtype_names,
)
def test_sizes_dtypes_and_numbers_of_models(dtypes, num_models):
    rng = np.random.default_rng(num_models)
    has_base = num_models != 4
    chosen = tuple(itertools.islice(itertools.cycle(dtypes), num_models + has_base))
    layer = make_layer(rng, chosen, SIZES, has_base=has_base)
    out = [Buffer(chosen[0], tensor[0].numel) for tensor in layer]
    check_merge(layer, rng.choice(COEFFICIENTS[:-2], (len(layer), num_models)), out, has_base)
    size = len(layer[0])
    gram = np.zeros((len(layer), size, size))
    TRITON.layer_gram(layer_table_of(layer, has_base), gram)
    expected = reference.layer_gram(operands(layer), has_base)
    assert gram_error(gram, expected) < (GRAM_F64 if F64 in chosen else GRAM_RANDOM)
    assert np.array_equal(gram, gram.transpose(0, 2, 1))


@pytest.mark.parametrize("misalignments", [(2, 4, 16), (1,), (8, 3)])
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, F16, F64), (F64,) * 2], ids=dtype_names)
def test_addresses(dtypes, misalignments):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, dtypes, (5, 700, 2049), misalignments=misalignments)
    out = [Buffer(dtypes[0], tensor[0].numel, misalignments[0]) for tensor in layer]
    check_merge(layer, [0.3, 0.6][: len(dtypes) - 1], out)
    gram = np.zeros((3, len(dtypes), len(dtypes)))
    TRITON.layer_gram(layer_table_of(layer), gram)
    assert gram_error(gram, reference.layer_gram(operands(layer), True)) < GRAM_RANDOM
    counts, firsts = TRITON.layer_nonfinite(layer_table_of(layer))
    assert not counts.any()
    assert (firsts == -1).all()


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + [(F32, BF16, F16)], ids=dtype_names)
def test_special_values_and_output_dtypes(dtypes, out_dtype):
    rng = np.random.default_rng(2)
    tensors = [make_layer(rng, dtypes, (600,), raws=raws)[0] for raws in (special_values, bit_patterns, halfway)]
    out = [Buffer(out_dtype, 600) for _ in tensors]
    check_merge(tensors, rng.choice(COEFFICIENTS, (3, 2)), out)


@pytest.mark.parametrize("out_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rounding_of_the_output(dtype, out_dtype):
    """Midpoints of neighbouring half values, and their neighbours in the wide format."""
    every = decode(np.arange(0, 65536, 5, dtype=np.uint16).view(np.uint8), out_dtype)
    bits = np.sort(every[np.isfinite(every)])
    exact = encode(bits, out_dtype).view(np.uint16)
    above = decode((exact + 1).astype(np.uint16).view(np.uint8), out_dtype)
    middles = (bits + above) / 2
    wide = encode(middles[np.isfinite(middles)], dtype).view(dtype.numpy_name)
    raw = np.concatenate([wide, np.nextafter(wide, np.inf), np.nextafter(wide, -np.inf)]).view(np.uint8)
    layer = [[buffer_of(raw, dtype), buffer_of(raw, dtype)]]
    check_merge(layer, [[0.3]], [Buffer(out_dtype, layer[0][0].numel)])


@pytest.mark.parametrize("sign", [0.0, -0.0])
def test_signed_zeros(sign):
    values = np.full(35, sign)
    for dtype in FLOATS:
        layer = [[buffer_of(encode(v, dtype), dtype) for v in (values, -values, values)]] * 4
        signs = list(itertools.product((0.0, -0.0), repeat=2))
        check_merge(layer, signs, [Buffer(dtype, 35) for _ in layer])
        check_merge(layer, [(*pair, 1.0) for pair in signs], [Buffer(dtype, 35) for _ in layer], has_base=False)


@pytest.mark.parametrize("target", [0, 1])
def test_output_may_be_an_operand(target):
    layer = make_layer(np.random.default_rng(3), (BF16,) * 3, (17, 2049, 5000))
    expected = reference.layer_merge(operands(layer), np.full((3, 2), 0.4), [BF16] * 3, True)
    TRITON.layer_merge(layer_table_of(layer), np.full((3, 2), 0.4), out_table_of([tensor[target] for tensor in layer]))
    for tensor, want in zip(layer, expected, strict=True):
        assert not differing(tensor[target].raw, want, BF16).size


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_touched_outside_of_operands_and_output(dtype, at_end):
    """The pages before and after can be neither read nor written: one byte too far ends the process."""
    rng = np.random.default_rng(4)
    layer = [[EdgeBuffer(dtype, numel, at_end) for _ in range(3)] for numel in (1, 35, 2047, 4097)]
    for tensor in layer:
        for buffer, raw in zip(tensor, weights(rng, (dtype,) * 3, tensor[0].numel), strict=True):
            buffer.raw[:] = raw
    check_merge(layer, [0.3, 0.6], [EdgeBuffer(dtype, tensor[0].numel, at_end) for tensor in layer])
    TRITON.layer_gram(layer_table_of(layer), np.zeros((4, 3, 3)))
    TRITON.layer_nonfinite(layer_table_of(layer))


@pytest.mark.parametrize("scale", [1e-20, 1e-38, 1e-44, 1e18, 1e30])
def test_gram_outside_of_the_range_of_fp32(scale):
    """Squares that underflow or overflow are summed again in fp64; a tensor that a model left as it was is not."""
    rng = np.random.default_rng(5)
    base = rng.normal(0, 1, 9000) * scale
    values = [base, base + rng.normal(0, 0.1, 9000) * scale, base]
    layer = [[buffer_of(encode(v, F32), F32) for v in values], make_layer(rng, (F32,) * 3, (9000,))[0]]
    gram = np.zeros((2, 3, 3))
    with np.errstate(all="ignore"):
        TRITON.layer_gram(layer_table_of(layer), gram)
    expected = reference.layer_gram(operands(layer), True)
    assert gram_error(gram, expected) < GRAM_RANDOM
    assert gram[0, 2, 2] == 0


def test_gram_of_constants():
    """All roundings go one way: the bound of the contract holds, with room for what it derives."""
    layer = [[buffer_of(encode(np.full(8192, v), F32), F32) for v in (0.1, 0.3, 0.7)]]
    gram = np.zeros((1, 3, 3))
    TRITON.layer_gram(layer_table_of(layer), gram)
    assert gram_error(gram, reference.layer_gram(operands(layer), True)) < GRAM_BOUND


def test_gram_is_added_to_and_nan_spreads():
    rng = np.random.default_rng(6)
    layer = make_layer(rng, (BF16,) * 3, (5000, 100))
    layer[1][2].raw[:2] = encode(np.array([np.nan]), BF16)
    gram = np.full((2, 3, 3), 2.0)
    TRITON.layer_gram(layer_table_of(layer), gram)
    expected = reference.layer_gram(operands(layer), True)
    assert gram_error(gram[:1] - 2.0, expected[:1]) < 1e-5  # 2 + 0.02 is rounded
    assert np.array_equal(np.isnan(gram[1]), np.isnan(expected[1]))


@pytest.mark.parametrize("has_base", [True, False])
def test_gram_of_many_models(has_base):
    """More operands than one launch takes."""
    layer = make_layer(np.random.default_rng(7), (BF16,) * 12, (1500, 3), has_base=has_base)
    gram = np.zeros((2, 12, 12))
    TRITON.layer_gram(layer_table_of(layer, has_base), gram)
    assert gram_error(gram, reference.layer_gram(operands(layer), has_base)) < GRAM_RANDOM


def test_many_tensors_are_one_launch():
    layer = make_layer(np.random.default_rng(8), (BF16,) * 2, [n % 7 for n in range(60)])
    out = [Buffer(BF16, tensor[0].numel) for tensor in layer]
    check_merge(layer, np.random.default_rng(9).normal(size=(60, 1)), out)


def test_nonfinite_elements_are_counted_and_found():
    layer = make_layer(np.random.default_rng(10), (BF16, F64, F32, F16), (1, 5000, 33), raws=special_values)
    layer += make_layer(np.random.default_rng(11), (BF16, F64, F32, F16), (0, 3000))
    layer[4][2].raw[2999 * 4 :] = encode(np.array([-np.inf]), F32)
    counts, firsts = TRITON.layer_nonfinite(layer_table_of(layer))
    expected = [[reference.count_nonfinite(*b.operand) for b in tensor] for tensor in layer]
    assert np.array_equal(np.stack([counts, firsts], axis=-1), expected)


@pytest.mark.parametrize("columns", [[1, 7, 50], [35, 49, 2]])
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, F64, F16)], ids=dtype_names)
def test_columns(dtypes, columns):
    from metagpt_fast import reference_rows

    rng = np.random.default_rng(12)
    layer = make_layer(rng, dtypes, (35, 49 * 7, 500), misalignments=(0, 2) if F64 not in dtypes else (0,))
    tables = [rng.normal(0.4, 0.3, (c, 2)) for c in columns]
    out = [Buffer(dtypes[0], tensor[0].numel) for tensor in layer]
    TRITON.column_merge(layer_table_of(layer), np.array(columns), tables, out_table_of(out))
    expected = reference_rows.column_merge(operands(layer), columns, tables, [dtypes[0]] * 3, True)
    assert not [k for k in range(3) if differing(out[k].raw, expected[k], dtypes[0]).size]
    grams = TRITON.column_gram(layer_table_of(layer), np.array(columns))
    for gram, want in zip(grams, reference_rows.column_gram(operands(layer), columns, True), strict=True):
        assert gram_error(gram, want) < 1e-11


def test_row_divergence():
    from metagpt_fast import reference_rows

    layer = make_layer(np.random.default_rng(13), (BF16, BF16), (35, 0, 2500))
    columns = np.array([7, 1, 50])
    found = TRITON.layer_row_divergence(layer_table_of(layer), columns)
    expected = reference_rows.layer_row_divergence(operands(layer), columns.tolist())
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("exponent", [2.0, 1.0, 0.0, -1.0, 0.5])
@pytest.mark.parametrize("num_models", [1, 3, 8])
def test_share_of_squares(num_models, exponent):
    """λ on the device, for one scope, several, and such without a change."""
    from metagpt_fast.methods.metagpt import share_of_squares

    rng = np.random.default_rng(14)
    layer = layer_table_of(make_layer(rng, (BF16,) * (num_models + 1), [3] * 70))
    gram = np.zeros((70, num_models + 1, num_models + 1))
    diagonal = np.einsum("kii->ki", gram)
    diagonal[:, 1:] = rng.random((70, num_models)) * 10.0 ** rng.integers(-30, 30, (70, 1))
    diagonal[5, 1:] = 0
    diagonal[6, 1] = 0
    scopes = [list(range(8, 70)), [0, 1], [2], [3, 4], [5], [6], [7]]
    device_gram = TRITON._memory.upload(gram)
    with np.errstate(all="ignore"):
        found = TRITON.share_on_device(layer, device_gram, scopes, exponent).numpy()
    for scope in scopes:
        want = share_of_squares(gram[scope].sum(axis=0).diagonal()[1:], exponent)
        np.testing.assert_allclose(found[scope], np.tile(want, (len(scope), 1)), rtol=1e-12, atol=1e-300)
