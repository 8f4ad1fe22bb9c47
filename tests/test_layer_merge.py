"""The merge kernel against the reference, bit for bit, on every instruction set of this machine."""

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
    bit_patterns,
    buffer_of,
    decode,
    differing,
    dtype_names,
    encode,
    halfway,
    make_layer,
    make_out,
    nonfinite,
    special_values,
    weights,
)
from .kernel_calls import FileBuffer, kernels, merge, operands

ISAS = _native.supported_isas()
MIXED = [
    (BF16, F32),
    (F32, BF16, F16),
    (F16, BF16, BF16),
    (F32, F64),
    (F64, BF16, F32),
    (BF16, F16, F32, F64),
]
# 1e39 is Inf in float32, 1e-40 subnormal, 1e-60 zero; 1 + 2^-40 has to be rounded.
COEFFICIENTS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1 / 3,
    0.3,
    -0.7,
    2.5,
    1 + 2.0**-40,
    1e-7,
    1e-40,
    1e-60,
    1e30,
    1e39,
]


KINDS = {"weights": weights, "special": special_values, "bits": bit_patterns, "ties": halfway}


def check(layer, coefficients, out, *, has_base=True, expected=None):
    """Compare every ISA with the reference: each bit of the output, its guards, the non-finite counts."""
    coefficients = np.ones((len(layer), len(layer[0]) - has_base)) * coefficients
    if expected is None:
        out_dtypes = [buffer.dtype for buffer in out]
        expected = reference.layer_merge(operands(layer), coefficients, out_dtypes, has_base)
    for isa in ISAS:
        for buffer in out:
            buffer.poison()
        with kernels(isa=isa):
            counts = merge(layer, coefficients, out, has_base)
            verify(layer, coefficients, out, expected, counts)
    return expected


def verify(layer, coefficients, out, expected, counts):
    for tensor, row, buffer, want, count in zip(layer, coefficients, out, expected, counts, strict=True):
        text = (
            f"isa={_native.isa()} threads={_native.num_threads()} has_base={len(tensor) > row.size} "
            f"numel={buffer.numel} {[str(b.dtype) for b in tensor]} at {[b.address % 64 for b in tensor]} -> "
            f"{buffer.dtype} at {buffer.address % 64}, coefficients={row.tolist()}"
        )
        got = buffer.raw
        wrong = differing(got, want, buffer.dtype)[:3]
        shown = [
            {"at": int(i), "got": a, "expected": b, "of": [float(decode(*v.operand)[i]) for v in tensor]}
            for i, a, b in zip(wrong, decode(got, buffer.dtype)[wrong], decode(want, buffer.dtype)[wrong], strict=True)
        ]
        assert not shown, f"{text}: {shown}"
        assert buffer.guards_intact(), f"{text}: wrote outside of the output"
        assert count == np.count_nonzero(nonfinite(want, buffer.dtype)), f"{text}: {count=}"


@pytest.fixture(params=ISAS)
def isa(request):
    with kernels(isa=request.param):
        yield request.param


# ------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5, 8, 16, 33])
@pytest.mark.parametrize("dtypes", [(d,) for d in FLOATS] + MIXED, ids=dtype_names)
def test_sizes_dtypes_and_numbers_of_models(dtypes, num_models, has_base):
    rng = np.random.default_rng(num_models)
    operand_dtypes = tuple(itertools.islice(itertools.cycle(dtypes), num_models + has_base))
    layer = make_layer(rng, operand_dtypes, (*SMALL_SIZES, 1000), has_base=has_base, misalignments=(0, 1, 2, 3))
    coefficients = rng.choice(COEFFICIENTS[:-2], (len(layer), num_models))
    out = make_out(layer, (operand_dtypes[0], BF16, F16, F32, F64), (0, 3, 1))
    check(layer, coefficients, out, has_base=has_base)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtypes", [(d,) * 4 for d in FLOATS] + MIXED, ids=dtype_names)
@pytest.mark.parametrize("kind", ["special", "bits", "ties"])
def test_special_values(kind, dtypes, out_dtype, has_base):
    rng = np.random.default_rng(31)
    layer = make_layer(rng, dtypes, (700, 33, 5), raws=KINDS[kind], has_base=has_base, misalignments=(0, 1, 2))
    coefficients = rng.choice(COEFFICIENTS, (len(layer), len(dtypes) - has_base))
    check(layer, coefficients, make_out(layer, [out_dtype], (0, 1)), has_base=has_base)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_every_coefficient(coefficient):
    rng = np.random.default_rng(32)
    for kind, dtype in itertools.product(KINDS, FLOATS):
        layer = make_layer(rng, (dtype,) * 2, (200,), raws=KINDS[kind])
        check(layer, [[coefficient]], make_out(layer, [dtype]))
        check(layer, [[coefficient, 0.3]], make_out(layer, [dtype]), has_base=False)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_half_value(dtype):
    """All 65536 patterns as base and as model, with and without change of dtype."""
    every = np.arange(65536, dtype=np.uint16)
    shuffled = np.random.default_rng(33).permutation(every)
    layer = [
        [buffer_of(a.view(np.uint8), dtype, 1), buffer_of(b.view(np.uint8), dtype)] for a, b in [(every, shuffled)]
    ]
    for out_dtype in FLOATS:
        out = make_out(layer, [out_dtype])
        check(layer, [[0.0]], out)
        check(layer, [[1 / 3]], out)
        check(layer, [[0.5, 0.5]], out, has_base=False)


@pytest.mark.parametrize("out_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rounding_of_the_output(dtype, out_dtype):
    """Midpoints of all neighbouring half values, and their neighbours in the wide format."""
    every = decode(np.arange(65536, dtype=np.uint16).view(np.uint8), out_dtype)
    points = np.sort(every[np.isfinite(every)])
    half_unit = (points[-1] - points[-2]) / 2
    middles = np.concatenate([(points[1:] + points[:-1]) / 2, [points[-1] + half_unit, points[0] - half_unit]])
    wide = encode(middles, dtype).view(dtype.numpy_name)
    values = np.concatenate([wide, np.nextafter(wide, np.inf), np.nextafter(wide, -np.inf)])
    raw = values.view(np.uint8)
    layer = [[buffer_of(raw, dtype), buffer_of(raw, dtype, 1)]]
    check(layer, [[0.3]], make_out(layer, [out_dtype]))


def test_one_rounding_per_fma():
    """(1 + 2^-12)² + tiny: rounding the product first, or adding in float64, gives the value below."""
    a, tiny = 1.0 + 2.0**-12, 2.0**-60
    raws = [encode(np.full(40, v), F32) for v in (tiny, a + tiny)]
    layer = [[buffer_of(raw, F32) for raw in raws]]
    (expected,) = check(layer, [[a]], make_out(layer, [F32]))
    assert expected.view(np.float32)[0] > np.float32(a * a)


@pytest.mark.parametrize("sign", [0.0, -0.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_signed_zeros(dtype, sign):
    values = np.full(35, sign)
    layer = [[buffer_of(encode(v, dtype), dtype) for v in (values, -values, values)]]
    for coefficients in itertools.product((0.0, -0.0, 1.0, -1.0), repeat=2):
        check(layer, [coefficients], make_out(layer, [dtype]))
        check(layer, [(*coefficients, 1.0)], make_out(layer, [dtype]), has_base=False)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_threads=st.integers(1, 4),
    has_base=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=2, max_size=7),
    out_dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    misalignments=st.lists(st.integers(0, 63), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_random_layers(*, num_threads, has_base, kind, dtypes, out_dtypes, sizes, misalignments, seed):
    rng = np.random.default_rng(seed)
    layer = make_layer(rng, dtypes, sizes, raws=KINDS[kind], has_base=has_base, misalignments=misalignments)
    if kind != "weights" and F64 in (*dtypes, *out_dtypes):
        layer = [[buffer_of(b.raw[: 100 * b.dtype.itemsize], b.dtype, 1) for b in tensor] for tensor in layer]
    coefficients = rng.choice(COEFFICIENTS, (len(layer), len(dtypes) - has_base))
    with kernels(num_threads=num_threads):
        check(layer, coefficients, make_out(layer, out_dtypes, misalignments[::-1]), has_base=has_base)


# ------------------------------------------------------------------------------ large tensors, threads


@pytest.mark.parametrize("numel", [*BLOCK_SIZES, *LARGE_SIZES])
@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (F32, BF16, F16), (F64,) * 2], ids=dtype_names)
def test_same_bits_for_any_isa_and_number_of_threads(dtypes, numel):
    rng = np.random.default_rng(34)
    layer = make_layer(rng, dtypes, (numel, 17, 0), misalignments=(1, 2))
    coefficients = rng.normal(0.3, 0.2, (len(layer), len(dtypes) - 1))
    expected = reference.layer_merge(operands(layer), coefficients, [dtypes[0]] * 3, True)
    for num_threads in (1, 2, 3, 7):
        with kernels(num_threads=num_threads):
            check(layer, coefficients, make_out(layer, dtypes[:1], (0, 3)), expected=expected)


# ------------------------------------------------------------------------------ where the bytes are


@pytest.mark.parametrize("dtypes", [(d,) * 3 for d in FLOATS] + [(BF16, F32, BF16)], ids=dtype_names)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_output_may_be_an_operand(isa, dtypes, target):
    """In place: the output is the base, or a model, of the same dtype at the same address."""
    layer = make_layer(np.random.default_rng(36), dtypes, (1, 17, 4097, 300_001), misalignments=(0, 1, 2))
    out_dtypes = [dtypes[target]] * len(layer)
    coefficients = np.full((len(layer), 2), 0.4)
    expected = reference.layer_merge(operands(layer), coefficients, out_dtypes, True)
    others = [[buffer.raw.copy() for v, buffer in enumerate(tensor) if v != target] for tensor in layer]
    out = [tensor[target] for tensor in layer]
    verify(layer, coefficients, out, expected, merge(layer, coefficients, out))
    for tensor, copies in zip(layer, others, strict=True):
        now = [buffer.raw for v, buffer in enumerate(tensor) if v != target]
        assert all(np.array_equal(a, b) for a, b in zip(now, copies, strict=True)), "another operand was changed"


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_touched_outside_of_operands_and_output(dtype, out_dtype, at_end):
    """The pages before and after can be neither read nor written: one byte too far ends the process."""
    rng = np.random.default_rng(37)
    sizes = (*range(36), 63, 65, 255, 513, 4097)
    layer = [[EdgeBuffer(dtype, numel, at_end) for _ in range(3)] for numel in sizes]
    for tensor in layer:
        for buffer, raw in zip(tensor, weights(rng, (dtype,) * 3, tensor[0].numel), strict=True):
            buffer.raw[:] = raw
    check(layer, [0.3, 0.6], [EdgeBuffer(out_dtype, numel, at_end) for numel in sizes])


@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, BF16, F64), (F16, F16, F32)], ids=dtype_names)
def test_files_give_the_same_bits(dtypes, out_dtype, tmp_path):
    layer = make_layer(np.random.default_rng(38), dtypes, (0, 1, 17, 4097, 300_001))
    out = make_out(layer, [out_dtype])
    expected = check(layer, [0.3, 0.6], out)
    files = {}

    def in_file(buffer, name):
        files[name] = FileBuffer(tmp_path / name, buffer, 3 + 7 * len(files))
        return files[name]

    layer_files = [[in_file(b, f"{k}-{v}") for v, b in enumerate(tensor)] for k, tensor in enumerate(layer)]
    out_files = [in_file(b, f"out-{k}") for k, b in enumerate(make_out(layer, [out_dtype]))]
    try:
        check(layer_files, [0.3, 0.6], make_out(layer, [out_dtype]), expected=expected)
        check(layer, [0.3, 0.6], out_files, expected=expected)
        check([[a, *b[1:]] for (a, *_), b in zip(layer, layer_files, strict=True)], [0.3, 0.6], out_files)
    finally:
        for file in files.values():
            file.close()


@pytest.mark.parametrize("operand", [2, -1])
def test_file_errors_name_the_operand(operand, tmp_path):
    """A model's file that ends early, and an output file that is open for reading only."""
    layer = make_layer(np.random.default_rng(39), (BF16,) * 3, (10, 5000))
    out = make_out(layer, [BF16])
    broken = FileBuffer(tmp_path / "broken", layer[1][2], 8)
    if operand < 0:
        broken.reopen_for_reading()
        out[1] = broken
    else:
        broken.path.write_bytes(broken.path.read_bytes()[:6000])
        layer[1][2] = broken
    try:
        with pytest.raises(_native.FileOperandError) as caught:
            merge(layer, np.full((2, 2), 0.5), out)
        assert _native.place_of(caught.value) == (1, operand)
    finally:
        broken.close()
