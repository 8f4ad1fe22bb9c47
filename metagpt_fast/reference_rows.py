"""The kernels that see a tensor as rows and columns, in NumPy; see :mod:`metagpt_fast.reference`.

``columns`` is the size of each tensor's last dimension: ``numel`` elements are seen as ``[numel / columns, columns]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .dtypes import F64, DType
from .errors import PlanError
from .reference import CHUNK_NUMEL, FloatArray, Layer, Operand, Raw, merge_chunk, to_float64

SOFTMAX_EPSILON = 1e-8


def layer_row_divergence(layer: Layer, columns: Sequence[int]) -> list[FloatArray]:
    """Return ``Σ p log(p / q)`` of every row, with softmax and sums in NumPy's long double.

        p = softmax(model row) + 1e-8,   q = softmax(base row) + 1e-8

    This is the measure of Arcee Fusion (mergekit's ``arcee_fusion``). Terms of both signs cancel in the sum, which
    leaves an error of about 2^-60 on x86 (64 bits of precision), whatever the divergence; where long double is double,
    2^-50. The kernels sum the terms in a form that does not cancel.

    Args:
        layer: K tensors ``[base, model]``.
        columns: K sizes of the last dimension.

    Returns:
        K arrays float64 ``[numel / columns]``.
    """
    divergences = []
    with np.errstate(all="ignore"):
        for operands, num_columns in zip(layer, columns, strict=True):
            rows = []
            for chunk, _ in _row_chunks(operands, num_columns):
                q, p = (_softmax(to_float64(*operand).reshape(-1, num_columns)) for operand in chunk)
                rows.append((p * np.log(p / q)).sum(axis=1).astype(np.float64))
            divergences.append(np.concatenate([np.empty(0), *rows]))
    return divergences


def column_gram(layer: Layer, columns: Sequence[int], has_base: bool) -> list[FloatArray]:
    """Return the Gram matrix of every column, as :func:`metagpt_fast.reference.layer_gram` of a tensor.

    Returns:
        K arrays float64 ``[C, V, V]``.
    """
    grams = []
    with np.errstate(all="ignore"):
        for operands, num_columns in zip(layer, columns, strict=True):
            gram = np.zeros((num_columns, len(operands), len(operands)))
            for chunk, _ in _row_chunks(operands, num_columns):
                vectors = np.stack([to_float64(*operand).reshape(-1, num_columns) for operand in chunk])
                if has_base:
                    vectors[1:] -= vectors[0]
                gram += np.einsum("irc,jrc->cij", vectors, vectors)
            grams.append(gram)
    return grams


def column_merge(
    layer: Layer,
    columns: Sequence[int],
    coefficients: Sequence[FloatArray],
    out_dtypes: Sequence[DType],
    has_base: bool,
) -> list[Raw]:
    """Return the merged tensors, each element as :func:`metagpt_fast.reference.layer_merge` with its column's row.

    Args:
        layer: K tensors, as there.
        columns: K sizes of the last dimension.
        coefficients: K arrays float64 ``[C, T]``.
        out_dtypes: the dtype of each result, [K].
        has_base: the first operand of each tensor is the base.

    Returns:
        K arrays of bytes.
    """
    merged = []
    for operands, num_columns, table, out_dtype in zip(layer, columns, coefficients, out_dtypes, strict=True):
        in_float64 = F64 in (out_dtype, *(dtype for _, dtype in operands))
        pieces = [np.empty(0, np.uint8)]
        for chunk, num_rows in _row_chunks(operands, num_columns):
            pieces.append(merge_chunk(chunk, np.tile(table.T, num_rows), out_dtype, has_base, in_float64))
        merged.append(np.concatenate(pieces))
    return merged


def _softmax(values: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.longdouble]]:
    wide = values.astype(np.longdouble)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    result: np.ndarray[tuple[int, ...], np.dtype[np.longdouble]] = (
        powers / powers.sum(axis=1, keepdims=True) + SOFTMAX_EPSILON
    )
    return result


def _row_chunks(operands: Sequence[Operand], num_columns: int) -> Iterator[tuple[list[Operand], int]]:
    """Cut the operands of one tensor into whole rows, about ``CHUNK_NUMEL`` elements; with the number of rows."""
    sizes = {raw.size // dtype.itemsize for raw, dtype in operands}
    if len(sizes) != 1:
        raise PlanError("operands of one tensor differ in length", got=sorted(sizes), expected="equal numel")
    (numel,) = sizes
    if numel == 0:
        return
    if num_columns < 1 or numel % num_columns:
        raise PlanError(
            "columns do not divide the tensor", where="columns", got=num_columns, expected=f"a divisor of {numel}"
        )
    step = max(1, CHUNK_NUMEL // num_columns) * num_columns
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        yield (
            [(raw[start * dtype.itemsize : stop * dtype.itemsize], dtype) for raw, dtype in operands],
            (stop - start) // num_columns,
        )
