"""Gram matrices and merges per column against the reference, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast import _native, reference, reference_rows
from metagpt_fast.backends import make_backend
from metagpt_fast.backends.tables import output_table
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import (
    FLOATS,
    EdgeBuffer,
    buffer_of,
    differing,
    dtype_names,
    encode,
    make_layer,
    make_out,
    nonfinite,
    random_special,
    weights,
)
from .kernel_calls import FileBuffer, column_gram, column_merge, dtype_code, gram, kernels, layer_table_of, operands
from .tolerances import GRAM_F64, GRAM_RANDOM, gram_error, gram_scale

ISAS = _native.supported_isas()
MIXED = [(BF16, F32, F16), (F32, F64, BF16), (F64, F16, F16, F32)]
# [R, C] around a vector, a tile, a chunk; blocks of 256 rows; 8192 columns, and rows longer than a span.
SHAPES = [
    (0, 5),
    (1, 1),
    (70, 1),
    (9, 3),
    (5, 15),
    (6, 17),
    (7, 127),
    (3, 129),
    (5, 511),
    (4, 512),
    (3, 513),
    (1, 1000),
]
LARGE_SHAPES = [
    (255, 40),
    (256, 300),
    (257, 129),
    (1025, 65),
    (3, 8192),
    (300, 8193),
    (2, 262145),
    (100_000, 2),
    (3, 4),
]


def layer_of(rng, dtypes, shapes, *, has_base=True, misalignments=(0, 1, 2, 3), raws=weights):
    sizes = [rows * columns for rows, columns in shapes]
    layer = make_layer(rng, dtypes, sizes, raws=raws, has_base=has_base, misalignments=misalignments)
    return layer, [columns for _, columns in shapes]


def check_gram(layer, columns, *, has_base=True):
    """Compare every ISA with the reference, and each with the first, which must have the same bits."""
    expected = reference_rows.column_gram(operands(layer), columns, has_base)
    first = None
    for isa in ISAS:
        with kernels(isa=isa):
            results = column_gram(layer, columns, has_base)
        for tensor, got, want in zip(layer, results, expected, strict=True):
            text = f"{isa=} {has_base=} {[str(b.dtype) for b in tensor]} of {got.shape[0]} columns"
            assert got.shape == want.shape, text
            assert np.array_equal(got, got.transpose(0, 2, 1), equal_nan=True), text
            assert np.array_equal(np.isfinite(got), np.isfinite(want)), text
            error = gram_error(got, want)
            assert error <= GRAM_F64, f"{error=:.3g}: {text}"
        first = results if first is None else first
        assert_same_bits(first, results, isa)
    return first


def assert_same_bits(first, results, what):
    for a, b in zip(first, results, strict=True):
        assert np.array_equal(a, b, equal_nan=True), f"{what} differs from {ISAS[0]} at {np.argwhere(a != b)[:3]}"


def random_coefficients(rng, columns, num_models):
    special = [0.0, -0.0, 1.0, -1.0, 1 / 3, 1 + 2.0**-40, 1e-40, 1e30]
    return [
        np.where(rng.random((c, num_models)) < 0.3, rng.choice(special, (c, num_models)), rng.normal(0.3, 0.5))
        for c in columns
    ]


def check_merge(layer, columns, coefficients, out, *, has_base=True, expected=None):
    """Compare every ISA with the reference: each bit of the output, its guards, the non-finite counts."""
    if expected is None:
        out_dtypes = [buffer.dtype for buffer in out]
        expected = reference_rows.column_merge(operands(layer), columns, coefficients, out_dtypes, has_base)
    for isa in ISAS:
        for buffer in out:
            buffer.poison()
        with kernels(isa=isa):
            counts = column_merge(layer, columns, coefficients, out, has_base)
        verify_merge(layer, columns, out, expected, counts, isa)
    return expected


def verify_merge(layer, columns, out, expected, counts, isa):
    for tensor, num_columns, buffer, want, count in zip(layer, columns, out, expected, counts, strict=True):
        text = f"{isa=} {[str(b.dtype) for b in tensor]} -> {buffer.dtype}, {num_columns} columns"
        wrong = differing(buffer.raw, want, buffer.dtype)[:5]
        assert wrong.size == 0, f"{text}: differs at {wrong}"
        assert buffer.guards_intact(), f"{text}: wrote outside of the output"
        assert count == np.count_nonzero(nonfinite(want, buffer.dtype)), f"{text}: {count=}"


# ------------------------------------------------------------------------------ column_gram


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + MIXED + [(BF16,) * 9], ids=dtype_names)
def test_gram_shapes_and_dtypes(dtypes, has_base):
    check_gram(*layer_of(np.random.default_rng(70), dtypes, SHAPES, has_base=has_base), has_base=has_base)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16,) * 4, (F32, F64, BF16)], ids=dtype_names)
def test_gram_same_bits_for_any_number_of_threads(dtypes):
    layer, columns = layer_of(np.random.default_rng(71), dtypes, LARGE_SHAPES)
    expected = check_gram(layer, columns)
    for num_threads in (1, 2, 3):
        with kernels(num_threads=num_threads):
            assert_same_bits(expected, column_gram(layer, columns), f"{num_threads} threads")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    has_base=st.booleans(),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=2, max_size=6),
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 300)), min_size=1, max_size=5),
    misalignments=st.lists(st.integers(0, 63), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_random_layers(*, has_base, dtypes, shapes, misalignments, seed):
    rng = np.random.default_rng(seed)
    layer, columns = layer_of(rng, dtypes, shapes, has_base=has_base, misalignments=misalignments)
    check_gram(layer, columns, has_base=has_base)
    out = make_out(layer, dtypes[::-1], misalignments[::-1])
    coefficients = random_coefficients(rng, columns, len(dtypes) - has_base)
    check_merge(layer, columns, coefficients, out, has_base=has_base)


def test_gram_of_columns_adds_up_to_that_of_the_tensor():
    layer, columns = layer_of(np.random.default_rng(72), (BF16,) * 3, [(300, 513), (4, 1000)])
    whole = gram(layer)
    total = np.stack([per_column.sum(axis=0) for per_column in column_gram(layer, columns)])
    assert gram_error(whole, total) <= GRAM_RANDOM


def test_gram_accumulates_and_pieces_keep_the_bits():
    """What a tensor too large for the window gets: pieces of whole blocks of rows, one after the other."""
    rng = np.random.default_rng(73)
    num_rows, num_columns = 1100, 37
    raws = weights(rng, (BF16,) * 3, num_rows * num_columns)
    (whole,) = column_gram([[buffer_of(raw, BF16) for raw in raws]], [num_columns])
    total = [np.zeros_like(whole)]
    for first, last in itertools.pairwise((0, 256, 1024, num_rows)):
        piece = [buffer_of(raw[2 * num_columns * first : 2 * num_columns * last], BF16) for raw in raws]
        assert column_gram([piece], [num_columns], into=total)[0] is total[0]
    np.testing.assert_array_equal(total[0], whole)


def test_gram_of_differences_that_float32_cannot_hold():
    """3e38 − (−3e38), and squares of 1e-30."""
    values = np.array([[3e38, -3e38, 1.0], [1e-30, 3e-30, 0.0]]).repeat(20, axis=0).T
    layer = [[buffer_of(encode(v, F32), F32) for v in values]]
    (got,) = check_gram(layer, [2])
    assert np.all(gram_scale(got) > 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gram_nonfinite_elements_spoil_their_own_column_only(dtype, bad):
    values = np.random.default_rng(74).normal(0.0, 1.0, (3, 300, 21))
    values[1, 280, 13] = bad
    layer = [[buffer_of(encode(v.ravel(), dtype), dtype) for v in values]]
    (got,) = check_gram(layer, [21])
    assert np.flatnonzero(~np.isfinite(got).all(axis=(1, 2))).tolist() == [13]
    assert np.isfinite(got[13])[::2, ::2].all()


# ------------------------------------------------------------------------------ column_merge


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + MIXED + [(BF16,) * 9], ids=dtype_names)
def test_merge_shapes_and_dtypes(dtypes, has_base):
    rng = np.random.default_rng(75)
    layer, columns = layer_of(rng, dtypes, SHAPES, has_base=has_base)
    out = make_out(layer, (dtypes[0], BF16, F16, F32, F64), (0, 3, 1))
    check_merge(layer, columns, random_coefficients(rng, columns, len(dtypes) - has_base), out, has_base=has_base)


@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, F16, BF16)], ids=dtype_names)
def test_merge_special_values(dtypes):
    rng = np.random.default_rng(76)

    def special(rng, dtypes, numel, *, has_base):
        return [random_special(rng, dtype, numel) for dtype in dtypes]

    layer, columns = layer_of(rng, dtypes, SHAPES, raws=special)
    for out_dtype in (BF16, F16, F32):
        check_merge(layer, columns, random_coefficients(rng, columns, 2), make_out(layer, [out_dtype]))


@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (F32, F64)], ids=dtype_names)
def test_merge_same_bits_for_any_number_of_threads(dtypes):
    rng = np.random.default_rng(77)
    layer, columns = layer_of(rng, dtypes, LARGE_SHAPES)
    coefficients = random_coefficients(rng, columns, len(dtypes) - 1)
    out = make_out(layer, dtypes[:1])
    with np.errstate(all="ignore"):
        expected = reference_rows.column_merge(
            operands(layer), columns, coefficients, [dtypes[0]] * len(layer), has_base=True
        )
    for num_threads in (1, 2, 3):
        with kernels(num_threads=num_threads):
            check_merge(layer, columns, coefficients, out, expected=expected)


def test_equal_coefficients_give_the_bits_of_layer_merge():
    layer, columns = layer_of(np.random.default_rng(78), (BF16,) * 3, [*SHAPES, *LARGE_SHAPES[:5]])
    row = np.array([0.3, -0.7])
    expected = reference.layer_merge(operands(layer), np.tile(row, (len(layer), 1)), [BF16] * len(layer), True)
    check_merge(layer, columns, [np.tile(row, (c, 1)) for c in columns], make_out(layer, [BF16]), expected=expected)


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_merge_output_may_be_an_operand(isa, target):
    rng = np.random.default_rng(79)
    layer, columns = layer_of(rng, (BF16,) * 3, [(5, 17), (300, 1030), (2, 262145)])
    coefficients = random_coefficients(rng, columns, 2)
    expected = reference_rows.column_merge(operands(layer), columns, coefficients, [BF16] * 3, has_base=True)
    out = [tensor[target] for tensor in layer]
    with kernels(isa=isa):
        counts = column_merge(layer, columns, coefficients, out)
    verify_merge(layer, columns, out, expected, counts, isa)


# ------------------------------------------------------------------------------ where the bytes are


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_touched_outside_of_operands_and_output(dtype, at_end):
    rng = np.random.default_rng(80)
    shapes = [(1, n) for n in (*range(1, 20), 513)] + [(3, 7), (5, 129), (40, 1)]
    layer = [[EdgeBuffer(dtype, rows * columns, at_end) for _ in range(3)] for rows, columns in shapes]
    for tensor in layer:
        for buffer, raw in zip(tensor, weights(rng, (dtype,) * 3, tensor[0].numel), strict=True):
            buffer.raw[:] = raw
    columns = [columns for _, columns in shapes]
    check_gram(layer, columns)
    out = [EdgeBuffer(dtype, tensor[0].numel, at_end) for tensor in layer]
    check_merge(layer, columns, random_coefficients(rng, columns, 2), out)


@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F16, F64, F16)], ids=dtype_names)
def test_files_give_the_same_bits(dtypes, tmp_path):
    rng = np.random.default_rng(81)
    layer, columns = layer_of(rng, dtypes, [(0, 5), (3, 17), (700, 513), (20, 8193), (2, 262145)], misalignments=(0,))
    coefficients = random_coefficients(rng, columns, 2)
    expected = column_gram(layer, columns)
    merged = check_merge(layer, columns, coefficients, make_out(layer, [BF16]))
    files = {}

    def in_file(buffer, name):
        files[name] = FileBuffer(tmp_path / name, buffer, 3 + 7 * len(files))
        return files[name]

    in_files = [[in_file(b, f"{k}-{v}") for v, b in enumerate(tensor)] for k, tensor in enumerate(layer)]
    out_files = [in_file(b, f"out-{k}") for k, b in enumerate(make_out(layer, [BF16]))]
    try:
        for mixed in (in_files, [[a, *b[1:]] for (a, *_), b in zip(layer, in_files, strict=True)]):
            assert_same_bits(expected, column_gram(mixed, columns), "files")
            check_merge(mixed, columns, coefficients, out_files, expected=merged)
        in_files[2][1].path.write_bytes(b"\0" * 1000)
        for call in (
            lambda: column_gram(in_files, columns),
            lambda: column_merge(in_files, columns, coefficients, out_files),
        ):
            with pytest.raises(_native.FileOperandError) as caught:
                call()
            assert _native.place_of(caught.value) == (2, 1)
    finally:
        for file in files.values():
            file.close()


def test_both_backends():
    rng = np.random.default_rng(82)
    layer, columns = layer_of(rng, (BF16, F32, BF16), [(4, 33), (1, 100), (0, 3)])
    table, row_sizes = layer_table_of(layer), np.array(columns, np.int64)
    coefficients = random_coefficients(rng, columns, 2)
    grams, outputs, counts = [], [], []
    for name in ("cpu", "reference"):
        backend = make_backend(name)
        into = [np.ones((c, 3, 3)) for c in columns]
        grams.append(backend.column_gram(table, row_sizes, into))
        out = make_out(layer, [F16])
        places = output_table([(buffer.address, buffer.descriptor, dtype_code(buffer)) for buffer in out])
        counts.append(backend.column_merge(table, row_sizes, coefficients, places).num_nonfinite.tolist())
        outputs.append([buffer.raw for buffer in out])
    for got, want in zip(*grams, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    for got, want in zip(*outputs, strict=True):
        np.testing.assert_array_equal(got, want)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("columns", [0, -1, 7, 1 << 40])
def test_columns_must_divide_the_tensor(columns):
    layer, _ = layer_of(np.random.default_rng(83), (BF16, BF16), [(4, 5)])
    with pytest.raises(ValueError, match="columns"):
        column_gram(layer, [columns])


def test_coefficients_must_have_a_row_per_column():
    layer, _ = layer_of(np.random.default_rng(84), (BF16, BF16), [(4, 5)])
    for wrong in (np.zeros((4, 1)), np.zeros((5, 2)), np.zeros((5, 1), np.float32), np.zeros((1, 5)).T[::-1]):
        with pytest.raises(ValueError, match="float64"):
            column_merge(layer, [5], [wrong], make_out(layer, [BF16]))
