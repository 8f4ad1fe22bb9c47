"""The divergence of rows against the reference and against decimal arithmetic, on every instruction set."""

from __future__ import annotations

import decimal
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast import _native, reference_rows
from metagpt_fast.backends import make_backend
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import FLOATS, EdgeBuffer, buffer_of, dtype_names, encode, make_layer, weights
from .kernel_calls import FileBuffer, kernels, layer_table_of, operands, row_divergence
from .tolerances import DIVERGENCE_NOISE, DIVERGENCE_NOISE_WIDE, divergence_bound

ISAS = _native.supported_isas()
PAIRS = list(itertools.product(FLOATS, repeat=2))
# Around lanes, a chunk, a block; rows that keep their exponentials or do not; rows longer than a span.
SHAPES = [(0, 5), (1, 1), (9, 1), (3, 2), (2, 15), (2, 16), (5, 17), (3, 511), (3, 512), (4, 513), (2, 4095), (2, 4097)]
LARGE_SHAPES = [(2, 32768), (2, 32769), (2, 262144), (3, 262145), (1, 600011), (3000, 257)]


def layer_of(rng, dtypes, shapes, misalignments=(0,)):
    sizes = [rows * columns for rows, columns in shapes]
    return make_layer(rng, dtypes, sizes, misalignments=misalignments), [columns for _, columns in shapes]


def check(layer, columns, *, noise=DIVERGENCE_NOISE, expected=None):
    """Compare every ISA with the reference, and each with the first, which must have the same bits."""
    if expected is None:
        expected = reference_rows.layer_row_divergence(operands(layer), columns)
    first = None
    for isa in ISAS:
        with kernels(isa=isa):
            results = row_divergence(layer, columns)
        for tensor, got, want in zip(layer, results, expected, strict=True):
            text = f"{isa=} {[str(b.dtype) for b in tensor]} numel={tensor[0].numel} rows={want.size}: {got}, {want}"
            assert got.shape == want.shape, text
            assert np.array_equal(np.isnan(got), np.isnan(want)), text
            error = np.abs(got - want)[~np.isnan(want)]
            assert np.all(error <= divergence_bound(want[~np.isnan(want)], noise)), f"{error}: {text}"
        first = results if first is None else first
        assert_same_bits(first, results, isa)
    return first


def assert_same_bits(first, results, what):
    for a, b in zip(first, results, strict=True):
        assert np.array_equal(a, b, equal_nan=True), f"{what} differs from {ISAS[0]}: {a}, {b}"


@pytest.mark.parametrize("dtypes", PAIRS, ids=dtype_names)
def test_shapes_and_dtypes(dtypes):
    check(*layer_of(np.random.default_rng(50), dtypes, SHAPES, (0, 1, 2, 3)))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F64)], ids=dtype_names)
def test_same_bits_for_any_number_of_threads(dtypes):
    layer, columns = layer_of(np.random.default_rng(51), dtypes, LARGE_SHAPES, (1, 0))
    expected = check(layer, columns)
    for num_threads in (1, 2, 3):
        with kernels(num_threads=num_threads):
            assert_same_bits(expected, row_divergence(layer, columns), f"{num_threads} threads")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    shapes=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 700)), min_size=1, max_size=5),
    misalignments=st.lists(st.integers(0, 63), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_random_layers(*, dtypes, shapes, misalignments, seed):
    check(*layer_of(np.random.default_rng(seed), dtypes, shapes, misalignments))


# ------------------------------------------------------------------------------ accuracy


def exact_divergence(base, model):
    """The definition with 60 digits."""
    with decimal.localcontext(prec=60):

        def softmax(row):
            powers = [decimal.Decimal(float(x)).exp() for x in row]
            total = sum(powers)
            return [power / total + decimal.Decimal("1e-8") for power in powers]

        pairs = zip(softmax(model), softmax(base), strict=True)
        return float(sum(p * (p / q).ln() for p, q in pairs))


@pytest.mark.parametrize("step", [10.0**-n for n in range(12)])
def test_rows_that_are_nearly_equal(step):
    """Down to divergences of 1e-22, of which terms p log(p/q) in float64 would leave nothing."""
    rng = np.random.default_rng(52)
    base = rng.normal(0.0, 0.02, (3, 37))
    model = base + rng.normal(0.0, step, base.shape)
    layer = [[buffer_of(encode(v.ravel(), F64), F64) for v in (base, model)]]
    want = np.array([exact_divergence(*rows) for rows in zip(base, model, strict=True)])
    (got,) = check(layer, [37])
    assert np.all(np.abs(got - want) <= divergence_bound(want, reference=0.0)), f"{got}, {want}"
    assert np.all(got > 0)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0, 100.0, 700.0, 1e4, 1e30])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F64)], ids=dtype_names)
def test_rows_of_large_numbers(dtypes, scale):
    """Softmaxes from flat to a single 1, where all that is left of the others is the 1e-8."""
    rng = np.random.default_rng(53)
    layer = [[buffer_of(encode(rng.normal(0.0, scale, 5 * 333), d), d) for d in dtypes]]
    check(layer, [333], noise=DIVERGENCE_NOISE_WIDE)


@pytest.mark.parametrize("shift", [0.25, -3.0, 1e3])
def test_softmax_does_not_see_a_shift(shift):
    rng = np.random.default_rng(54)
    base = rng.integers(-1000, 1000, 600) / 1024
    layer = [[buffer_of(encode(v, F64), F64) for v in (base, base + shift)]]
    (got,) = check(layer, [200])
    assert np.all(got <= 2.0**-98)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F64, BF16), (F16, F64), (F32, F32)], ids=dtype_names)
def test_equal_rows_diverge_by_exactly_nothing(dtypes):
    """Whatever their dtypes are, if the values are the same."""
    values = np.random.default_rng(55).integers(-100, 100, 40 * 100) / 512.0
    layer = [[buffer_of(encode(values, d), d) for d in dtypes]]
    for columns in (1, 40, 100, 4000):
        (got,) = check(layer, [columns])
        assert not got.any()


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_elements_spoil_their_own_row_only(dtype, operand, bad):
    """A −Inf is an element of probability 0, as in any softmax; a row of nothing else has none."""
    rng = np.random.default_rng(56)
    values = [rng.normal(0.0, 0.02, (6, 50)) for _ in range(2)]
    values[operand][2, [0, 17, 49]] = bad
    values[operand][4] = bad
    layer = [[buffer_of(encode(v.ravel(), dtype), dtype) for v in values]]
    (got,) = check(layer, [50], noise=DIVERGENCE_NOISE_WIDE)
    spoilt = [False, False, not bad < 0, False, True, False]
    assert np.isnan(got).tolist() == spoilt


def test_long_row_with_nan():
    values = np.random.default_rng(57).normal(0.0, 0.02, (2, 300_001))
    values[1, 299_999] = np.nan
    (got,) = check([[buffer_of(encode(v, F32), F32) for v in values]], [300_001])
    assert np.isnan(got).all()


# ------------------------------------------------------------------------------ where the bytes are


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_read_outside_the_operands(dtype, at_end):
    rng = np.random.default_rng(58)
    shapes = [(1, n) for n in (*range(1, 36), 513)] + [(3, 7), (5, 129)]
    layer = [[EdgeBuffer(dtype, rows * columns, at_end) for _ in range(2)] for rows, columns in shapes]
    for tensor in layer:
        for buffer, raw in zip(tensor, weights(rng, (dtype,) * 2, tensor[0].numel), strict=True):
            buffer.raw[:] = raw
    check(layer, [columns for _, columns in shapes])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F64)], ids=dtype_names)
def test_file_operands_give_the_same_bits(dtypes, tmp_path):
    layer, columns = layer_of(np.random.default_rng(59), dtypes, [(0, 5), (3, 17), (700, 513), (2, 300_001)])
    expected = row_divergence(layer, columns)
    in_files = [
        [FileBuffer(tmp_path / f"{k}-{v}", buffer, 3 + 7 * v) for v, buffer in enumerate(tensor)]
        for k, tensor in enumerate(layer)
    ]
    try:
        for mixed in (in_files, [[a, b] for (a, _), (_, b) in zip(layer, in_files, strict=True)]):
            assert_same_bits(expected, row_divergence(mixed, columns), "files")
        in_files[2][1].path.write_bytes(b"\0" * 1000)
        with pytest.raises(_native.FileOperandError) as caught:
            row_divergence(in_files, columns)
        assert _native.place_of(caught.value) == (2, 1)
    finally:
        for buffer in itertools.chain(*in_files):
            buffer.close()


def test_both_backends():
    layer, columns = layer_of(np.random.default_rng(60), (BF16, F32), [(4, 33), (1, 100), (0, 3)])
    table = layer_table_of(layer)
    cpu, slow = (
        make_backend(name).layer_row_divergence(table, np.array(columns, np.int64)) for name in ("cpu", "reference")
    )
    for got, want in zip(cpu, slow, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("columns", [0, -1, 7, 1 << 40])
def test_columns_must_divide_the_tensor(columns, backend):
    layer, _ = layer_of(np.random.default_rng(61), (BF16, BF16), [(4, 5)])
    with pytest.raises(ValueError, match="columns"):
        make_backend(backend).layer_row_divergence(layer_table_of(layer), np.array([columns]))


def test_one_base_and_one_model():
    layer = make_layer(np.random.default_rng(62), (BF16,) * 3, [20])
    with pytest.raises(ValueError, match="3 operands"):
        row_divergence(layer, [5])
