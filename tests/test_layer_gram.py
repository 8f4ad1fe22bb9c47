"""The Gram kernel against the float64 reference, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast import _native, reference
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import (
    BLOCK_SIZES,
    FLOATS,
    LARGE_SIZES,
    SMALL_SIZES,
    EdgeBuffer,
    buffer_of,
    dtype_names,
    encode,
    make_layer,
    nonfinite,
    random_special,
    weights,
)
from .kernel_calls import FileBuffer, count_nonfinite, gram, kernels, operands
from .tolerances import GRAM_BOUND, GRAM_F64, GRAM_RANDOM, gram_error

ISAS = _native.supported_isas()
MIXED = [(BF16, F32), (F32, BF16), (F16, BF16), (F32, F64), (F64, BF16), (BF16, F16, F32, F64)]


def cycled(dtypes, num):
    return tuple(itertools.islice(itertools.cycle(dtypes), num))


def check(layer, *, has_base=True, tolerance=GRAM_RANDOM):
    """Compare every ISA with the reference, and each with the first, which must have the same bits."""
    expected = reference.layer_gram(operands(layer), has_base)
    results = {}
    for isa in ISAS:
        with kernels(isa=isa):
            results[isa] = gram(layer, has_base)
            for tensor, got, want in zip(layer, results[isa], expected, strict=True):
                verify(tensor, got, want, has_base, tolerance)
    assert_same_bits(results, layer)
    return results[ISAS[0]]


def verify(tensor, got, want, has_base, tolerance):
    text = (
        f"isa={_native.isa()} threads={_native.num_threads()} {has_base=} numel={tensor[0].numel} "
        f"{[str(b.dtype) for b in tensor]} at {[b.address % 64 for b in tensor]}: got {got}, expected {want}"
    )
    assert np.array_equal(got, got.T, equal_nan=True), text
    assert np.array_equal(np.isfinite(got), np.isfinite(want)), text
    error = gram_error(got, want)
    assert error <= tolerance, f"{error=:.3g} > {tolerance=:.3g}: {text}"


def assert_same_bits(results, layer):
    """Compare results, by what was done to get them, with the first of them."""
    (first_key, first), *others = results.items()
    for key, result in others:
        differs = result.view(np.uint64) != first.view(np.uint64)
        differs &= ~(np.isnan(result) & np.isnan(first))
        for k, tensor in enumerate(layer):
            assert not differs[k].any(), (
                f"{key} differs from {first_key} at {np.argwhere(differs[k]).tolist()}: "
                f"numel={tensor[0].numel} {[str(b.dtype) for b in tensor]}: {result[k]}, {first[k]}"
            )


@pytest.fixture(params=ISAS)
def isa(request):
    with kernels(isa=request.param):
        yield request.param


# ------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5, 8, 16, 33])
@pytest.mark.parametrize("dtypes", [(d,) for d in FLOATS] + MIXED, ids=dtype_names)
def test_sizes_dtypes_and_numbers_of_models(dtypes, num_models, has_base):
    rng = np.random.default_rng(num_models)
    sizes = (*SMALL_SIZES, BLOCK_SIZES[num_models % 4])
    operand_dtypes = cycled(dtypes, num_models + has_base)
    check(make_layer(rng, operand_dtypes, sizes, has_base=has_base), has_base=has_base)


@pytest.mark.parametrize("misalignments", [(1,), (2, 3), (1, 2, 4, 8), (5, 0, 31), (63, 33)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_misaligned_operands(dtype, misalignments):
    rng = np.random.default_rng(11)
    check(make_layer(rng, (dtype,) * 4, (1, 17, 65, 513, *BLOCK_SIZES), misalignments=misalignments))


@pytest.mark.parametrize("numel", LARGE_SIZES)
@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (F32, BF16, F16), (F64,) * 2], ids=dtype_names)
def test_large_tensors(dtypes, numel):
    check(make_layer(np.random.default_rng(12), dtypes, [numel], misalignments=(1, 2, 3)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_threads=st.integers(1, 4),
    has_base=st.booleans(),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=2, max_size=7),
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=6),
    misalignments=st.lists(st.integers(0, 63), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_random_layers(*, num_threads, has_base, dtypes, sizes, misalignments, seed):
    rng = np.random.default_rng(seed)
    with kernels(num_threads=num_threads):
        check(make_layer(rng, dtypes, sizes, has_base=has_base, misalignments=misalignments), has_base=has_base)


@pytest.mark.parametrize("dtypes", [(F64,) * 3, (F64, F32, F64), (F32, F64, F32)], ids=dtype_names)
def test_float64_operands_are_not_rounded_to_float32(dtypes):
    """Task vectors of 1e-9 of the weights: nothing of them is left in float32."""
    rng = np.random.default_rng(13)
    base = encode(rng.normal(0.0, 1.0, 5000).astype(np.float32).astype(np.float64), F64).view(np.float64)
    values = [base, *(base * (1 + rng.normal(0.0, 1e-9, 5000)) for _ in dtypes[1:])]
    layer = [[buffer_of(encode(v, d), d) for v, d in zip(values, dtypes, strict=True)]]
    check(layer, tolerance=GRAM_F64)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2.0**-23, 0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("numel", [4096, 4097, 100_000])
def test_equal_values_stay_within_the_bound(value, numel):
    """Every product is the same, so that every rounding of a partial sum goes the same way."""
    raws = [encode(np.full(numel, v), F32) for v in (value, 1.7 * value, -value)]
    check([[buffer_of(raw, F32) for raw in raws]], tolerance=GRAM_BOUND)


def test_sums_that_grow_and_shrink_stay_within_the_bound():
    """A large product first and then small ones, each lost by half a unit in the last place."""
    values = np.full(4096 * 3, 2.0**-12 * 0.999)
    values[::4096] = 1.0
    values[1::4096] = -1.0
    raws = [encode(v, F32) for v in (values, -values, np.abs(values))]
    check([[buffer_of(raw, F32) for raw in raws]], has_base=False, tolerance=GRAM_BOUND)


# ------------------------------------------------------------------------------ range


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "scales",
    [
        (1e30, 1e30, 1e30),
        (1e30, 1.0, 1e-25),
        (1.0, 1e-25, 1e-25),
        (1.0, 1e-20, 1e-19),
        (1.0, 1e-30, 1e30),
        (1e-3, 1e-40, 1e-10),
        (1e-38, 1e-39, 1e-44),
        (1e19, 1e18, 1e-18),
        (3e38, 1e38, 1.0),
        (1e-22, 2e-23, 1e-38),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_base", [True, False])
def test_squares_beyond_the_range_of_float32(dtype, scales, has_base):
    rng = np.random.default_rng(14)
    values = np.stack([rng.uniform(0.3, 1.0, 9000) * scale * rng.choice([-1, 1], 9000) for scale in scales])
    layer = [[buffer_of(encode(v, dtype), dtype, 1) for v in values[:, :n]] for n in (9000, 4096, 100, 5, 1)]
    check(layer, has_base=has_base, tolerance=GRAM_BOUND)


def test_one_large_element_among_tiny_ones():
    """Blocks of one tensor need different treatment: one overflows, one underflows, one does neither."""
    rng = np.random.default_rng(15)
    values = rng.normal(0.0, 1.0, (4, 5 * 4096))
    values[:, :4096] *= 1e-24
    values[1, 4096 * 2 + 7] = 1e25
    values[2, 4096 * 3 :] *= 1e-23
    layer = [[buffer_of(encode(v, F32), F32) for v in values]]
    check(layer, has_base=False, tolerance=GRAM_BOUND)
    check(layer, tolerance=GRAM_BOUND)


def test_sum_that_overflows_where_no_product_does():
    """2e18² = 4e36 fits float32; the sum of a lane's 256 such products does not."""
    raws = [encode(np.full(4096, v), F32) for v in (2e18, -2e18, 1.0)]
    check([[buffer_of(raw, F32) for raw in raws]], has_base=False, tolerance=GRAM_BOUND)


def test_difference_that_overflows_float32():
    """3e38 − (−3e38) is Inf in float32, and its norm an ordinary number."""
    raws = [encode(np.full(100, v), F32) for v in (3e38, -3e38, 1.0)]
    check([[buffer_of(raw, F32) for raw in raws]], tolerance=GRAM_BOUND)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_differences_whose_squares_underflow_in_half_precision(dtype):
    """(1e-4)² = 0 in float16, and a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(16)
    base = rng.choice([2.0**-6, -(2.0**-6)], 20_000)
    steps = [base + rng.choice([-(2.0**-14), 2.0**-14], 20_000) for _ in range(3)]
    small = [rng.choice([2.0**-24, 2.0**-20, 0.0], 20_000) for _ in range(4)]  # subnormal in float16
    raws = [[encode(v, dtype) for v in values] for values in ([base, *steps], small)]
    layer = [[buffer_of(raw, dtype, 3) for raw in tensor] for tensor in raws]
    assert reference.layer_gram(operands(layer), True)[1, 1, 1] > 0
    check(layer)


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 16, 4095, 4096, 8999])
def test_nonfinite_elements_spoil_their_own_entries_only(dtype, bad, place):
    rng = np.random.default_rng(17)
    values = rng.normal(0.0, 1.0, (4, 9000))
    for operand in range(4):
        spoilt = values.copy()
        spoilt[operand, place] = bad
        for has_base in (True, False):
            layer = [[buffer_of(encode(v, dtype), dtype) for v in spoilt]]
            (actual,) = check(layer, has_base=has_base, tolerance=GRAM_BOUND)
            own = np.arange(4) == operand
            all_of_them = has_base and operand == 0
            expected = ~(own[:, None] | own) & (not all_of_them)
            assert np.isfinite(actual).tolist() == expected.tolist()


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + [(BF16, F32, F16)], ids=dtype_names)
def test_special_values(dtypes, has_base):
    """Zeros, subnormals and the ends of the range in every combination; no NaN or Inf among them."""
    rng = np.random.default_rng(18)

    def raws(rng, dtypes, numel, *, has_base):
        return [random_special(rng, dtype, numel, finite=True) for dtype in dtypes]

    layer = make_layer(rng, dtypes, (1, 2, 17, 511, 5000), raws=raws, has_base=has_base)
    check(layer, has_base=has_base, tolerance=GRAM_BOUND)


@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + [(BF16, F32, F64)], ids=dtype_names)
def test_nonfinite_counts(isa, dtypes):
    rng = np.random.default_rng(19)

    def raws(rng, dtypes, numel, *, has_base):
        plain = weights(rng, dtypes, numel)
        special = [random_special(rng, dtype, numel // 2) for dtype in dtypes]
        both = zip(plain, special, strict=True)
        return [np.concatenate([raw[: raw.size - tail.size], tail]) for raw, tail in both]

    layer = make_layer(rng, dtypes, (0, 1, 33, 513, 9000, 300_000), raws=raws, misalignments=(0, 1, 2))
    layer += make_layer(rng, dtypes, (0, 1, 5000), misalignments=(1,))  # without any
    counts, firsts = count_nonfinite(layer)
    for tensor, row, first_row in zip(layer, counts, firsts, strict=True):
        for buffer, count, first in zip(tensor, row, first_row, strict=True):
            where = np.flatnonzero(nonfinite(*buffer.operand))
            expected = (where.size, where[0] if where.size else -1)
            assert (count, first) == expected, f"isa={isa} {buffer.dtype} numel={buffer.numel}"


def test_no_difference_gives_exact_zeros():
    raw = weights(np.random.default_rng(20), (BF16,), 10_000)[0]
    (actual,) = check([[buffer_of(raw, BF16, shift) for shift in (0, 1, 2)]])
    assert actual[0, 0] > 0
    assert np.count_nonzero(actual) == 1


# ------------------------------------------------------------------------------ same bits


@pytest.mark.parametrize(
    "dtypes", [(BF16,) * 4, (F32,) * 3, (F16,) * 6, (F64,) * 3, (BF16, F32, F16, F64)], ids=dtype_names
)
def test_same_bits_for_any_isa_and_number_of_threads(dtypes):
    rng = np.random.default_rng(21)
    layer = make_layer(rng, dtypes, (0, 1, 31, 4095, 8191, *LARGE_SIZES[::3], 65), misalignments=(1, 0, 2))
    layer += [[buffer_of(encode(rng.normal(0, 1e-24, 9999), d), d) for d in dtypes]]
    results = {}
    for name, num_threads in itertools.product(ISAS, (1, 2, 3, 7)):
        with kernels(isa=name, num_threads=num_threads):
            results[name, num_threads] = gram(layer)
    assert_same_bits(results, layer)


def test_same_bits_alone_and_in_a_layer(isa):
    """A tensor's result does not depend on its neighbours, on where its bytes lie, or on its aliases."""
    rng = np.random.default_rng(22)
    layer = make_layer(rng, (BF16,) * 4, (5000, 300_001, 17, 64), misalignments=(0, 1, 2))
    together = gram(layer)
    for k, tensor in enumerate(layer):
        moved = [buffer_of(buffer.raw, buffer.dtype, 7) for buffer in tensor]
        np.testing.assert_array_equal(gram([moved])[0], together[k])
        np.testing.assert_array_equal(gram([tensor[:2]])[0], together[k, :2, :2])
        np.testing.assert_array_equal(gram([[tensor[0], tensor[1], tensor[1]]])[0, 1], together[k, 1][[0, 1, 1]])


def test_accumulates_and_pieces_keep_the_bits(isa):
    """What a tensor too large for the window gets: pieces of whole spans, added one after the other."""
    rng = np.random.default_rng(23)
    numel = 3 * _native.SPAN_NUMEL + 77
    raws = weights(rng, (BF16,) * 3, numel)
    whole = gram([[buffer_of(raw, BF16) for raw in raws]])
    total = np.zeros_like(whole)
    for first, last in itertools.pairwise((0, _native.SPAN_NUMEL, 3 * _native.SPAN_NUMEL, numel)):
        gram([[buffer_of(raw[2 * first : 2 * last], BF16) for raw in raws]], into=total)
    np.testing.assert_array_equal(total, whole)
    again = gram([[buffer_of(raw, BF16) for raw in raws]], into=whole.copy())
    np.testing.assert_array_equal(again, 2 * whole)


# ------------------------------------------------------------------------------ where the bytes are


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_read_outside_the_operands(dtype, at_end):
    """The pages before and after cannot be read: one byte too far ends the process."""
    rng = np.random.default_rng(25)
    sizes = (*range(36), 63, 65, 127, 255, 511, 513, *BLOCK_SIZES)
    layer = [[EdgeBuffer(dtype, numel, at_end) for _ in range(3)] for numel in sizes]
    for tensor in layer:
        for buffer, raw in zip(tensor, weights(rng, (dtype,) * 3, tensor[0].numel), strict=True):
            buffer.raw[:] = raw
    check(layer)
    count_nonfinite(layer)


@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, BF16, F64), (F16, F16, F32)], ids=dtype_names)
def test_file_operands_give_the_same_bits(isa, dtypes, tmp_path):
    rng = np.random.default_rng(26)
    layer = make_layer(rng, dtypes, (0, 1, 17, 4097, 300_001))
    expected = gram(layer)
    in_files = [
        [FileBuffer(tmp_path / f"{k}-{v}", buffer, 3 + 7 * v) for v, buffer in enumerate(tensor)]
        for k, tensor in enumerate(layer)
    ]
    try:
        for mixed in (in_files, [[a, *b[1:]] for (a, *_), b in zip(layer, in_files, strict=True)]):
            np.testing.assert_array_equal(gram(mixed).view(np.uint64), expected.view(np.uint64))
            for counts, in_memory in zip(count_nonfinite(mixed), count_nonfinite(layer), strict=True):
                np.testing.assert_array_equal(counts, in_memory)
    finally:
        for buffer in itertools.chain(*in_files):
            buffer.close()


def test_file_that_ends_early_is_an_error_that_names_the_operand(tmp_path):
    layer = make_layer(np.random.default_rng(27), (BF16,) * 3, (10, 5000))
    cut = FileBuffer(tmp_path / "cut", layer[1][2], 8)
    try:
        cut.path.write_bytes(cut.path.read_bytes()[:6000])
        with pytest.raises(_native.FileOperandError) as caught:
            gram([layer[0], [*layer[1][:2], cut]])
        assert _native.place_of(caught.value) == (1, 2)
    finally:
        cut.close()
