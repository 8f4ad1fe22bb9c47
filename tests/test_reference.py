"""The reference itself, against exact rational arithmetic, ml_dtypes and torch."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast import reference
from metagpt_fast.dtypes import BF16, DTYPES, F16, F32, F64, DType
from metagpt_fast.errors import PlanError

from .arrays import (
    FLOATS,
    bits_of,
    decode,
    differing,
    dtype_names,
    encode,
    nonfinite,
    random_bits,
    random_special,
    special_bits,
    weights,
)
from .tolerances import gram_error

# precision in bits, exponent of the smallest subnormal, exponent of the largest finite number's power of two
FORMATS = {F32: (24, -149, 127), F16: (11, -24, 15), BF16: (8, -133, 127), F64: (53, -1074, 1023)}


def round_exactly(value: Fraction, dtype: DType) -> float:
    """Round a nonzero rational to nearest even, by definition, in integers."""
    precision, smallest_exponent, largest_exponent = FORMATS[dtype]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, smallest_exponent)
    rounded = round(magnitude / unit) * unit  # round() of a Fraction takes ties to even
    result = float(rounded) if rounded < Fraction(2) ** (largest_exponent + 1) else float("inf")
    return -result if value < 0 else result


def fma_by_definition(a: float, b: float, c: float, dtype: DType) -> float:
    if not all(np.isfinite((a, b, c))):
        product = np.float64(a) * np.float64(b) if not np.isfinite((a, b)).all() else np.float64(0.0)
        return float(product + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return round_exactly(exact, dtype) if exact != 0 else a * b + c if a * b == 0 else 0.0


def sample_values(rng: np.random.Generator, dtype: DType, numel: int) -> np.ndarray:
    """Values that make rounding hard: special ones, random bits, and numbers of few bits, which give ties."""
    few_bits = np.ldexp(rng.integers(-255, 256, numel), rng.integers(-30, 30, numel))
    parts = [random_special(rng, dtype, numel), random_bits(rng, dtype, numel), encode(few_bits, dtype)]
    return rng.permutation(np.concatenate([part.view(dtype.numpy_name) for part in parts]))


# -------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_half_pattern_survives(dtype):
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    values = reference.to_float64(raw, dtype)
    np.testing.assert_array_equal(values, decode(raw, dtype))
    assert differing(reference.round_from_float64(values, dtype), raw, dtype).size == 0
    with np.errstate(invalid="ignore"):  # signalling NaN
        single = values.astype(np.float32)
    assert differing(reference.round_from_float32(single, dtype), raw, dtype).size == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_to_float64_reads_misaligned_bytes(dtype):
    rng = np.random.default_rng(1)
    raw = random_bits(rng, dtype, 100)
    shifted = np.concatenate([np.zeros(1, np.uint8), raw])[1:]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(reference.to_float64(shifted, dtype), decode(raw, dtype))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_round_from_float64_by_definition(dtype):
    """Every midpoint of two neighbours near the ends of the range and at 1, a hair above, a hair below."""
    rng = np.random.default_rng(2)
    finite = decode(special_bits(dtype, finite=True), dtype)
    points = np.concatenate([finite, decode(random_bits(rng, dtype, 300), dtype)])
    points = points[np.isfinite(points)]
    precision, smallest_exponent, largest_exponent = FORMATS[dtype]
    half_unit = np.ldexp(0.5, np.maximum(np.frexp(points)[1] - precision, smallest_exponent))
    middles = np.concatenate([points + half_unit, points - half_unit])
    limit = 2.0 ** (largest_exponent + 1)
    values = np.concatenate(
        [
            points,
            middles,
            np.nextafter(middles, np.inf),
            np.nextafter(middles, -np.inf),
            [limit, -limit, 1e308],
        ]
    )
    values = values[values != 0]
    rounded = decode(reference.round_from_float64(values, dtype), dtype)
    expected = np.array([round_exactly(Fraction(v), dtype) for v in values])
    np.testing.assert_array_equal(rounded, expected)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(values))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_round_from_float64_rounds_once(dtype):
    """Just above a midpoint, by less than float32 sees: rounding through float32 would go down to even."""
    precision, _, _ = FORMATS[dtype]
    above = 1.0 + 2.0**-precision + 2.0**-45
    (rounded,) = decode(reference.round_from_float64(np.array([above]), dtype), dtype)
    assert rounded == 1.0 + 2.0 ** (1 - precision)


@pytest.mark.parametrize(
    ("dtype", "other"),
    [(BF16, ml_dtypes.bfloat16), (F16, np.float16), (BF16, torch.bfloat16), (F16, torch.float16)],
)
def test_round_from_float32_agrees_with_other_libraries(dtype, other):
    rng = np.random.default_rng(3)
    values = np.concatenate([random_bits(rng, F32, 100_000), special_bits(F32)]).view(np.float32)
    if isinstance(other, torch.dtype):
        expected = torch.from_numpy(values).to(other).view(torch.uint8).numpy()
    else:
        with np.errstate(all="ignore"):
            expected = values.astype(other).view(np.uint8)
    actual = reference.round_from_float32(values, dtype)
    assert differing(actual, expected, dtype).size == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounded_nan_is_quiet_and_zero_keeps_its_sign(dtype):
    signalling = special_bits(F64)[-8:].view(np.float64)
    assert np.isnan(signalling).all()
    (bits,) = bits_of(reference.round_from_float64(signalling, dtype), dtype)
    precision, _, _ = FORMATS[dtype]
    assert int(bits) >> (precision - 2) & 1, hex(int(bits))
    (bits,) = bits_of(reference.round_from_float64(np.array([-0.0]), dtype), dtype)
    assert int(bits) == 1 << (dtype.bits - 1)


# -------------------------------------------------------------------------------- fma


def test_fma_float32_on_all_special_values():
    values = special_bits(F32).view(np.float32)
    triples = np.array(list(itertools.product(values, repeat=3)), dtype=np.float32).T
    check_fma_float32(*triples)


def test_fma_float32_on_random_and_nearly_cancelling_values():
    rng = np.random.default_rng(4)
    a, b, c = (sample_values(rng, F32, 1500) for _ in range(3))
    with np.errstate(all="ignore"):
        near = np.float32(a) * np.float32(b)
    steps = rng.integers(-3, 4, near.size).astype(np.float32)
    with np.errstate(all="ignore"):
        nearly_cancelling = -near + steps * np.spacing(near)
    check_fma_float32(a, b, c)
    check_fma_float32(a, b, nearly_cancelling)


def test_fma_float32_where_float64_arithmetic_rounds_twice():
    """A product just off a tie of float32; a tie that an addend breaks from too far below for float64."""
    near_half_unit = 2.0**-24 * (1 - 2.0**-23)
    check_one_fma_float32(1.0 + 2.0**-23, near_half_unit, 1.0)
    check_one_fma_float32(-1.0 - 2.0**-23, near_half_unit, -1.0)
    tie = 4097.0**2  # 2^24 + 2^13 + 1, where float32 has every second integer
    for addend in (2.0**-40, -(2.0**-40), 2.0**-149, -(2.0**-149), 0.0):
        check_one_fma_float32(4097.0, 4097.0, addend)
        check_one_fma_float32(-4097.0, 4097.0, addend)
    rounded_twice = np.float32(tie + 2.0**-40)
    assert reference.fma_float32(*np.array([[4097.0], [4097.0], [2.0**-40]], np.float32))[0] > rounded_twice


def check_one_fma_float32(a, b, c):
    check_fma_float32(*np.array([[a], [b], [c]], dtype=np.float32))


def check_fma_float32(a, b, c):
    actual = reference.fma_float32(a, b, c)
    assert actual.dtype == np.float32
    with np.errstate(all="ignore"):
        expected = [fma_by_definition(*map(float, abc), F32) for abc in zip(a, b, c, strict=True)]
    assert_same(actual, np.array(expected, dtype=np.float32), F32, (a, b, c))


def test_fma_float64_on_all_special_values():
    values = special_bits(F64).view(np.float64)
    triples = np.array(list(itertools.product(values, repeat=3))).T
    check_fma_float64(*triples)


def test_fma_float64_on_random_and_nearly_cancelling_values():
    rng = np.random.default_rng(5)
    a, b, c = (sample_values(rng, F64, 600) for _ in range(3))
    moderate_a, moderate_b = rng.normal(size=a.size), rng.normal(size=a.size)
    products = moderate_a * moderate_b
    check_fma_float64(a, b, c)
    check_fma_float64(moderate_a, moderate_b, -products)  # what remains is the rounding error of the product
    check_fma_float64(moderate_a, moderate_b, products * 2.0 ** rng.integers(-110, 110, a.size))
    check_fma_float64(moderate_a, moderate_b, c)
    check_fma_float64(np.float64(1 / 3), b, c)


def test_fma_float64_at_ends_of_the_fast_path():
    rng = np.random.default_rng(6)
    size = 400
    fractions = 1 + rng.integers(0, 2**52, (3, size)) / 2.0**52
    for exponent_a, exponent_b in itertools.product((-451, -450, 449, 450), repeat=2):
        a, b = np.ldexp(fractions[0], exponent_a), np.ldexp(fractions[1], exponent_b)
        near_product = rng.integers(-60, 60, size) + exponent_a + exponent_b
        check_fma_float64(a, b, np.ldexp(fractions[2], near_product) * rng.choice([-1, 1], size))
        check_fma_float64(a, b, np.ldexp(fractions[2], rng.integers(-1074, -900, size)))
        check_fma_float64(a, b, np.ldexp(fractions[2], rng.integers(900, 1000, size)))


def check_fma_float64(a, b, c):
    actual = reference.fma_float64(a, b, c)
    triples = np.broadcast_arrays(a, b, c)
    with np.errstate(all="ignore"):
        expected = [fma_by_definition(*map(float, abc), F64) for abc in zip(*triples, strict=True)]
    assert_same(actual, np.array(expected), F64, triples)


def assert_same(actual, expected, dtype, inputs):
    wrong = differing(actual.view(np.uint8), expected.view(np.uint8), dtype)
    shown = [(actual[i], expected[i], [float(x[i]).hex() for x in inputs]) for i in wrong[:3]]
    assert not shown, f"{wrong.size} of {actual.size} differ: (actual, expected, operands) = {shown}"


finite_singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
finite_doubles = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(finite_singles, finite_singles, finite_singles)
def test_fma_float32_hypothesis(a, b, c):
    check_fma_float32(*np.array([[a], [b], [c]], dtype=np.float32))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(finite_doubles, finite_doubles, finite_doubles)
def test_fma_float64_hypothesis(a, b, c):
    check_fma_float64(*np.array([[a], [b], [c]]))


# -------------------------------------------------------------------------------- gram and merge


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("numel", [0, 1, 5, reference.CHUNK_NUMEL, reference.CHUNK_NUMEL + 1])
def test_gram_is_the_sum_of_products(has_base, numel):
    dtypes = (BF16, F32, F16, F64)
    layer = [list(zip(weights(np.random.default_rng(7), dtypes, numel), dtypes, strict=True))]
    values = [decode(raw, dtype) for raw, dtype in layer[0]]
    vectors = [values[0], *(v - values[0] for v in values[1:])] if has_base else values
    expected = np.array([[[float(np.sum(v * w)) for w in vectors] for v in vectors]])
    actual = reference.layer_gram(layer, has_base)
    assert actual.shape == (1, 4, 4)
    assert gram_error(actual, expected) < 1e-13
    np.testing.assert_array_equal(actual, actual.transpose(0, 2, 1))


def test_gram_of_no_tensors_is_empty():
    assert reference.layer_gram([], True).shape[0] == 0


def test_gram_of_nonfinite_spares_the_other_models():
    values = np.array([[1.0, 2.0], [1.5, np.nan], [3.0, 4.0]])
    layer = [[(encode(v, F32), F32) for v in values]]
    (gram,) = reference.layer_gram(layer, True)
    assert np.isfinite(gram).tolist() == [[True, False, True], [False, False, False], [True, False, True]]


def merge_one_by_one(values, dtypes, coefficients, out_dtype, has_base):
    """Merge one element by the definition, in rational arithmetic."""
    working = F64 if F64 in (out_dtype, *dtypes) else F32
    total = values[0] if has_base else -0.0
    for c, model in zip(coefficients, values[has_base:], strict=True):
        coefficient = float(np.float32(c)) if working is F32 else c
        delta = fma_by_definition(1.0, model, -values[0], working) if has_base else model
        total = fma_by_definition(coefficient, delta, total, working)
    if total == 0 or not np.isfinite(total):
        return total
    return round_exactly(Fraction(total), out_dtype)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(F32,) * 3, (BF16,) * 4, (F16,) * 2, (F64,) * 3, (BF16, F32, F16), (F32, F64)], ids=dtype_names
)
def test_merge_by_definition(dtypes, out_dtype, has_base):
    rng = np.random.default_rng(8)
    numel = 250
    kinds = [
        weights(rng, dtypes, numel, has_base=has_base),
        [random_special(rng, dtype, numel) for dtype in dtypes],
        [random_bits(rng, dtype, numel) for dtype in dtypes],
    ]
    raws = [np.concatenate(parts) for parts in zip(*kinds, strict=True)]
    coefficients = rng.choice([0.0, 1.0, -1.0, 1 / 3, 0.7, 1e-30, -2.5], len(dtypes) - has_base)
    operands = list(zip(raws, dtypes, strict=True))
    values = np.array([decode(*operand) for operand in operands])
    with np.errstate(all="ignore"):
        expected = [
            merge_one_by_one(list(map(float, v)), dtypes, list(map(float, coefficients)), out_dtype, has_base)
            for v in values.T
        ]
    (actual,) = reference.layer_merge([operands], coefficients[None], [out_dtype], has_base)
    wrong = differing(actual, encode_exact(expected, out_dtype), out_dtype)
    shown = [(decode(actual, out_dtype)[i], expected[i], values[:, i]) for i in wrong[:3]]
    assert not shown, f"{wrong.size} differ: (actual, expected, operands) = {shown}, {coefficients=}"


def encode_exact(values, dtype):
    """Encode values that ``dtype`` holds exactly."""
    raw = encode(np.array(values), dtype)
    np.testing.assert_array_equal(decode(raw, dtype), values)
    return raw


def test_merge_in_chunks_equals_merge_of_pieces(monkeypatch):
    rng = np.random.default_rng(9)
    dtypes = (BF16, F32, F16)
    raws = weights(rng, dtypes, 1000)
    layer = [
        list(zip(raws, dtypes, strict=True)),
        [(raw[:0], dtype) for raw, dtype in zip(raws, dtypes, strict=True)],
    ]
    coefficients = np.array([[0.3, 0.7], [0.5, 0.5]])
    whole = reference.layer_merge(layer, coefficients, [BF16, F32], True)
    monkeypatch.setattr(reference, "CHUNK_NUMEL", 37)
    pieces = reference.layer_merge(layer, coefficients, [BF16, F32], True)
    np.testing.assert_array_equal(whole[0], pieces[0])
    assert whole[1].size == pieces[1].size == 0


def test_merge_float64_measures_the_accuracy_of_a_merge():
    rng = np.random.default_rng(10)
    dtypes = (F32,) * 4
    layer = [list(zip(weights(rng, dtypes, 1000), dtypes, strict=True))]
    coefficients = np.array([[0.2, 0.3, 0.5]])
    (exact,) = reference.merge_float64(layer, coefficients, True)
    base, *models = (decode(*operand) for operand in layer[0])
    np.testing.assert_allclose(exact, base + coefficients[0] @ (np.array(models) - base), rtol=1e-12, atol=1e-15)
    (merged,) = reference.layer_merge(layer, coefficients, [F32], True)
    assert np.max(np.abs(decode(merged, F32) - exact)) < 4 * 2.0**-24 * 0.1
    (without_base,) = reference.merge_float64(layer, np.array([[0.1, 0.2, 0.3, 0.4]]), False)
    np.testing.assert_allclose(without_base, [0.1, 0.2, 0.3, 0.4] @ np.array([base, *models]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_count_nonfinite(dtype, monkeypatch):
    raw = np.concatenate([special_bits(dtype, finite=True), special_bits(dtype)])
    where = np.flatnonzero(nonfinite(raw, dtype))
    monkeypatch.setattr(reference, "CHUNK_NUMEL", 5)
    assert reference.count_nonfinite(raw, dtype) == (6, int(where[0]))
    assert reference.count_nonfinite(special_bits(dtype, finite=True), dtype) == (0, -1)
    assert reference.count_nonfinite(raw[:0], dtype) == (0, -1)


def test_what_cannot_be_merged_is_refused():
    four = np.zeros(4, np.uint8)
    with pytest.raises(PlanError, match="dtype cannot be merged: got I32"):
        reference.layer_gram([[(four, DTYPES["I32"]), (four, F32)]], True)
    with pytest.raises(PlanError, match=r"differ in length: got \[1, 2\]"):
        reference.layer_merge([[(four, F32), (four, F16)]], np.ones((1, 1)), [F32], True)
    with pytest.raises(PlanError, match="no whole number of elements: got 3"):
        reference.count_nonfinite(four[:3], BF16)
