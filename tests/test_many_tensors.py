"""Layers of thousands of small tensors, as a scope per row makes them: grouped, read and written together."""

from __future__ import annotations

import os

import numpy as np
import pytest

from metagpt_fast import _native
from metagpt_fast.dtypes import BF16, F32

from .kernel_calls import kernels

NUM_COLUMNS = 96
NUM_ROWS = 9000  # three and a bit spans
BF16_CODE, F32_CODE = BF16.code, F32.code


def tables(addresses, files, codes, numels):
    """Tables of K tensors from one list per operand."""
    return (
        np.array(addresses, np.uint64).T.copy(),
        np.array(files, np.int32).T.copy(),
        np.array(codes, np.uint8).T.copy(),
        np.array(numels, np.int64),
    )


@pytest.fixture
def weights_of_rows():
    rng = np.random.default_rng(90)
    return [rng.integers(0x3C00, 0x3D00, NUM_ROWS * NUM_COLUMNS).astype(np.uint16) for _ in range(3)]


@pytest.fixture
def open_file(tmp_path):
    descriptors = []

    def create(name, content):
        (tmp_path / name).write_bytes(content)
        descriptors.append(os.open(tmp_path / name, os.O_RDWR))
        return descriptors[-1]

    yield create
    for descriptor in descriptors:
        os.close(descriptor)


def expected_results(operands, sizes, coefficients):
    """Gram matrices and outputs of the rows, each given to the kernels alone and in memory."""
    grams, outputs, first = [], [], 0
    for size, row in zip(sizes, coefficients, strict=True):
        table = tables([[o.ctypes.data + 2 * first] for o in operands], [[-1]] * 3, [[BF16_CODE]] * 3, [size])
        gram, out = np.zeros((1, 3, 3)), np.zeros(size, np.uint16)
        _native.layer_gram(*table, True, gram)
        place = (np.array([out.ctypes.data], np.uint64), np.array([-1], np.int32), np.array([BF16_CODE], np.uint8))
        _native.layer_merge(*table, True, row[None], *place)
        grams.append(gram[0])
        outputs.append(out)
        first += size
    return np.stack(grams), outputs


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("gap", [0, 6])
def test_rows_of_a_tensor(weights_of_rows, open_file, num_threads, in_files, gap):
    """In order and out of order, next to each other and with gaps, with empty tensors among them."""
    rng = np.random.default_rng(91)
    sizes = np.full(NUM_ROWS, NUM_COLUMNS)
    sizes[[0, 5, NUM_ROWS - 1]] = 0
    sizes[rng.integers(0, NUM_ROWS, 300)] = 17
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    coefficients = rng.normal(0.3, 0.2, (NUM_ROWS, 2))
    want_grams, want_outputs = expected_results(weights_of_rows, sizes, coefficients)

    order = np.arange(NUM_ROWS)
    order[1000:2000] = rng.permutation(order[1000:2000])
    files = [open_file(str(i), o.tobytes()) if in_files else -1 for i, o in enumerate(weights_of_rows)]
    bases = [0 if in_files else o.ctypes.data for o in weights_of_rows]
    table = tables(
        [base + 2 * starts[order] for base in bases],
        [[file] * NUM_ROWS for file in files],
        [[BF16_CODE] * NUM_ROWS] * 3,
        sizes[order],
    )
    out_starts = 2 * starts + gap * np.arange(NUM_ROWS)
    blank = np.full(int(out_starts[-1]) + 2 * NUM_COLUMNS, 0xA5, np.uint8)
    expected = blank.copy()
    for start, result in zip(out_starts, want_outputs, strict=True):
        expected[start : start + 2 * result.size] = result.view(np.uint8)
    out_file = open_file("out", blank.tobytes()) if in_files else -1
    out = (
        (out_starts[order] + (0 if in_files else blank.ctypes.data)).astype(np.uint64),
        np.full(NUM_ROWS, out_file, np.int32),
        np.full(NUM_ROWS, BF16_CODE, np.uint8),
    )
    grams = np.zeros((NUM_ROWS, 3, 3))
    with kernels(num_threads=num_threads):
        _native.layer_gram(*table, True, grams)
        counts, crcs = _native.layer_merge(*table, True, coefficients[order], *out)
    np.testing.assert_array_equal(grams, want_grams[order])
    assert not counts.any()
    got = np.frombuffer(os.pread(out_file, blank.size + 1, 0), np.uint8) if in_files else blank
    np.testing.assert_array_equal(got, expected)
    rows = [result.tobytes() if in_files else b"" for result in want_outputs]
    assert crcs.tolist() == [_native.crc32c(rows[row]) for row in order]


def test_files_and_dtypes_that_change_from_row_to_row(weights_of_rows, open_file):
    """What is next to each other by its offset, but in another file or of another dtype."""
    rows = 64
    singles = [(o.astype(np.uint32) << 16).view(np.float32) for o in weights_of_rows]
    half = [open_file(f"half-{i}", o.tobytes()) for i, o in enumerate(weights_of_rows)]
    full = [open_file(f"full-{i}", o.tobytes()) for i, o in enumerate(singles)]
    sizes = np.full(rows, NUM_COLUMNS)
    coefficients = np.full((rows, 2), 0.4)
    want_grams, want_outputs = expected_results(weights_of_rows, sizes, coefficients)
    wide = np.arange(rows) % 3 == 1
    offsets = np.arange(rows) * NUM_COLUMNS * np.where(wide, 4, 2)
    table = tables(
        [offsets] * 3,
        [np.where(wide, b, a) for a, b in zip(half, full, strict=True)],
        [np.where(wide, F32_CODE, BF16_CODE)] * 3,
        sizes,
    )
    outs = [open_file("out-0", b""), open_file("out-1", b"")]
    swap = np.arange(rows) % 5 == 2
    out = (
        np.arange(rows).astype(np.uint64) * np.uint64(2 * NUM_COLUMNS),
        np.where(swap, *outs).astype(np.int32),
        np.full(rows, BF16_CODE, np.uint8),
    )
    grams = np.zeros((rows, 3, 3))
    _native.layer_gram(*table, True, grams)
    np.testing.assert_array_equal(grams, want_grams)
    _native.layer_merge(*table, True, coefficients, *out)
    for row, want in enumerate(want_outputs):
        descriptor = outs[0] if swap[row] else outs[1]
        got = np.frombuffer(os.pread(descriptor, 2 * NUM_COLUMNS, int(out[0][row])), np.uint16)
        np.testing.assert_array_equal(got, want)


def test_error_names_the_tensor_that_is_cut_off(weights_of_rows, open_file):
    """Of many that are read together."""
    rows, complete = 400, 123
    nbytes = 2 * NUM_COLUMNS
    cut = [o.tobytes()[: complete * nbytes + 10] if i == 2 else o.tobytes() for i, o in enumerate(weights_of_rows)]
    files = [open_file(str(i), content) for i, content in enumerate(cut)]
    table = tables(
        [np.arange(rows) * nbytes] * 3,
        [[file] * rows for file in files],
        [[BF16_CODE] * rows] * 3,
        [NUM_COLUMNS] * rows,
    )
    with kernels(num_threads=1), pytest.raises(_native.FileOperandError) as caught:
        _native.layer_gram(*table, True, np.zeros((rows, 3, 3)))
    assert _native.place_of(caught.value) == (complete, 2)
