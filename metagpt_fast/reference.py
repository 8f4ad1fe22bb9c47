"""The contract in NumPy: the oracle that the kernels are tested against, and a backend.

Nothing here shares code with the kernels. A tensor is a pair ``(raw, dtype)``: its bytes as a 1-D uint8 array
of any alignment, and their :class:`~metagpt_fast.dtypes.DType`. A layer is a list of tensors, each a list of
V operands of equal numel: ``[base, model_1 ... model_T]``, or the T models alone where ``has_base`` is False.

Memory beyond the results is bounded: tensors are worked through in chunks of ``CHUNK_NUMEL`` elements.
The calling thread must round to nearest and keep subnormals, as a thread does unless it was told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, F16, F32, F64, MERGEABLE, DType
from .errors import PlanError

Raw: TypeAlias = NDArray[np.uint8]
Operand: TypeAlias = tuple[Raw, DType]
Layer: TypeAlias = Sequence[Sequence[Operand]]
FloatArray: TypeAlias = NDArray[np.float64]

CHUNK_NUMEL = 1 << 16

# dtype -> (bits of precision, exponent of the smallest subnormal, largest finite value)
_HALF_FORMATS = {
    F16: (11, -24, 65504.0),
    BF16: (8, -133, 255.0 * 2.0**120),
}


def to_float64(raw: Raw, dtype: DType) -> FloatArray:
    """Return the elements of ``raw`` as float64, which holds every value of every mergeable dtype exactly."""
    with np.errstate(all="ignore"):  # converting a signalling NaN is an invalid operation
        return _to_native(raw, dtype).astype(np.float64)


def round_from_float64(values: FloatArray, dtype: DType) -> Raw:
    """Round ``values`` once to ``dtype``, to nearest with ties to even, and return the bytes.

    Too large becomes Inf, NaN becomes a quiet NaN, the sign of zero stays.
    """
    _check_mergeable(dtype)
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        values = np.where(np.isnan(values), np.nan, values).astype(np.float64, copy=False)
        if dtype is F64:
            return values.view(np.uint8)
        if dtype is F32:
            return values.astype(np.float32).view(np.uint8)
        # In units of its last place a value is an integer plus what rounding decides about. Scaling by a
        # power of two is exact here, so rint is the only rounding. 2^(exponent - 1) <= |value| < 2^exponent.
        precision, smallest_exponent, largest = _HALF_FORMATS[dtype]
        _, exponent = np.frexp(values)
        unit = np.maximum(exponent - precision, smallest_exponent)
        rounded: FloatArray = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
        rounded[np.abs(rounded) > largest] *= np.inf
        if dtype is F16:
            return rounded.astype(np.float16).view(np.uint8)
        upper_half: NDArray[np.uint32] = rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)
        return upper_half.astype(np.uint16).view(np.uint8)


def round_from_float32(values: NDArray[np.float32], dtype: DType) -> Raw:
    """Round float32 ``values`` once to ``dtype``; see :func:`round_from_float64`."""
    with np.errstate(all="ignore"):
        return round_from_float64(np.asarray(values, dtype=np.float32).astype(np.float64), dtype)


def layer_gram(layer: Layer, has_base: bool) -> FloatArray:
    """Return the Gram matrices of a layer, every operation in float64.

        gram[k, i, j] = Σ_e v_i[e] v_j[e],   v = [base, τ_1 ... τ_T],   τ_t = model_t − base

    Args:
        layer: K tensors of V operands each; V is the same for all.
        has_base: the first operand of each tensor is the base. Without one, v = [model_1 ... model_T].

    Returns:
        float64 [K, V, V]; zeros for a tensor without elements, NaN or Inf where IEEE arithmetic gives them.
    """
    num_vectors = len(layer[0]) if layer else 0
    gram = np.zeros((len(layer), num_vectors, num_vectors))
    with np.errstate(all="ignore"):
        for k, operands in enumerate(layer):
            for chunk in _chunks(operands):
                vectors = np.stack([to_float64(raw, dtype) for raw, dtype in chunk])
                if has_base:
                    vectors[1:] -= vectors[0]
                gram[k] += vectors @ vectors.T
    return gram


def layer_merge(layer: Layer, coefficients: FloatArray, out_dtypes: Sequence[DType], has_base: bool) -> list[Raw]:
    """Return the merged tensors of a layer, bit for bit what every backend writes (NaN payloads apart).

        out = round(fma(c_{T-1}, τ_{T-1}, ... fma(c_0, τ_0, base))),   τ_t = model_t − base

    in float32, or in float64 if an operand or the output is F64. τ is rounded to that format, so is c (once),
    and each fma rounds once. Without a base, τ_t = model_t and the sum starts at −0.0, which leaves the first
    product as it is, −0.0 included.

    Args:
        layer: K tensors, as for :func:`layer_gram`.
        coefficients: float64 [K, T].
        out_dtypes: the dtype of each result, [K].
        has_base: the first operand of each tensor is the base.

    Returns:
        K arrays of bytes, ``numel * out_dtype.itemsize`` each.
    """
    merged = []
    for operands, row, out_dtype in zip(layer, coefficients, out_dtypes, strict=True):
        _check_mergeable(out_dtype)
        in_float64 = F64 in (out_dtype, *(dtype for _, dtype in operands))
        out = np.empty(_numel(operands) * out_dtype.itemsize, dtype=np.uint8)
        start = 0
        for chunk in _chunks(operands):
            result = merge_chunk(chunk, row, out_dtype, has_base, in_float64)
            out[start : start + result.size] = result
            start += result.size
        merged.append(out)
    return merged


def merge_float64(layer: Layer, coefficients: FloatArray, has_base: bool) -> list[FloatArray]:
    """Return ``base + Σ_t c_t (model_t − base)``, or ``Σ_t c_t model_t`` without a base, in plain float64.

    It says how accurate a merge is, where :func:`layer_merge` says what its bits are.
    """
    merged = []
    with np.errstate(all="ignore"):
        for operands, row in zip(layer, coefficients, strict=True):
            _numel(operands)
            base = to_float64(*operands[0]) if has_base else np.float64(0.0)
            terms = [c * (to_float64(*model) - base) for c, model in zip(row, operands[has_base:], strict=True)]
            merged.append(base + np.sum(terms, axis=0))
    return merged


def merge_chunk(
    chunk: Sequence[Operand], coefficients: FloatArray, out_dtype: DType, has_base: bool, in_float64: bool
) -> Raw:
    """Merge elements of one tensor; ``coefficients`` float64 [T], or [T, numel] with one for every element."""
    merge = _merge_chunk_in_float64 if in_float64 else _merge_chunk_in_float32
    return merge(chunk, coefficients, out_dtype, has_base)


def count_nonfinite(raw: Raw, dtype: DType) -> tuple[int, int]:
    """Return how many elements are NaN or Inf, and the index of the first of them (−1 if there is none)."""
    count, first, start = 0, -1, 0
    for ((piece, _),) in _chunks([(raw, dtype)]):
        indices = np.flatnonzero(~np.isfinite(to_float64(piece, dtype)))
        if indices.size and first < 0:
            first = start + int(indices[0])
        count += indices.size
        start += CHUNK_NUMEL
    return count, first


def fma_float32(
    a: NDArray[np.float32] | np.float32, b: NDArray[np.float32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return ``a * b + c`` rounded once to float32, elementwise.

    Proof. The product of two float32 has at most 48 bits and lies between 2^-298 and 2^256, so float64 holds
    it exactly. TwoSum gives total + error = product + c exactly (every term is a multiple of 2^-298, nothing
    overflows), with total the nearest float64. If error ≠ 0, the exact sum lies between total and the next
    float64 in the direction of error; one of these two has an odd last bit, and taking it is rounding to odd.
    A value rounded to odd to 53 bits and then to nearest to at most 51 bits equals the value rounded to
    nearest once (Boldo and Melquiond, 2008); float32 keeps 24, or fewer where it is subnormal. If error = 0,
    total is exact, its sign of zero is IEEE's, and there is one rounding anyway.
    """
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        total, error = _two_sum(product, c.astype(np.float64))
        return _to_odd(total, error).astype(np.float32)


def fma_float64(a: FloatArray | np.float64, b: FloatArray, c: FloatArray) -> FloatArray:
    """Return ``a * b + c`` rounded once to float64, elementwise, for all operands.

    Where nothing can overflow or underflow on the way, this is Boldo and Melquiond's emulation (2008): the
    product and two sums are split without error, the two small remainders are added with rounding to odd, and
    the last addition rounds. The conditions below leave room: the product is a multiple of 2^(2·(-450-52)) =
    2^-1004, and no sum reaches 2^951. The rest is done in exact rational arithmetic, which is slow and rare.
    """
    a, b, c = np.broadcast_arrays(np.asarray(a, np.float64), b, c)
    with np.errstate(all="ignore"):
        high = a * b
        low = _product_error(a, b, high)
        small, small_error = _two_sum(c, low)
        total, total_error = _two_sum(high, small)
        result = total + _to_odd(*_two_sum(small_error, total_error))

        finite = np.isfinite(a) & np.isfinite(b)
        # A zero, Inf or NaN factor makes the product exact; a finite product cannot change a non-finite c.
        exact_product = ~finite | (a == 0) | (b == 0)
        result = np.where(exact_product, high + c, np.where(np.isfinite(c), result, c))
        in_range = (np.abs(c) < 2.0**950) & _is_moderate(a) & _is_moderate(b)
        for index in np.flatnonzero(~(exact_product | ~np.isfinite(c) | in_range)):
            result[index] = _fma_exact(float(a[index]), float(b[index]), float(c[index]))
    return result


def _merge_chunk_in_float32(
    chunk: Sequence[Operand], coefficients: FloatArray, out_dtype: DType, has_base: bool
) -> Raw:
    """Merge one chunk whose operands and output are all F32, F16 or BF16."""
    with np.errstate(all="ignore"):
        operands = [_to_native(raw, dtype).astype(np.float32) for raw, dtype in chunk]
        total = operands[0] if has_base else np.full_like(operands[0], -0.0)
        for coefficient, model in zip(coefficients.astype(np.float32), operands[has_base:], strict=True):
            total = fma_float32(coefficient, model - operands[0] if has_base else model, total)
    return round_from_float32(total, out_dtype)


def _merge_chunk_in_float64(
    chunk: Sequence[Operand], coefficients: FloatArray, out_dtype: DType, has_base: bool
) -> Raw:
    """Merge one chunk that has F64 among its operands or as its output."""
    with np.errstate(all="ignore"):
        operands = [to_float64(raw, dtype) for raw, dtype in chunk]
        total = operands[0] if has_base else np.full_like(operands[0], -0.0)
        for coefficient, model in zip(coefficients, operands[has_base:], strict=True):
            total = fma_float64(coefficient, model - operands[0] if has_base else model, total)
    return round_from_float64(total, out_dtype)


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the rounded sum and its exact error, unless the sum overflows (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _to_odd(total: FloatArray, error: FloatArray) -> FloatArray:
    """Return ``total + error`` rounded to odd, given that ``total`` is that sum rounded to nearest."""
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0)
    # Incrementing the bits of a float64 of either sign steps away from zero, decrementing steps towards it.
    step = np.where(np.signbit(total) == np.signbit(error), 1, -1)
    return np.where(inexact & (bits & 1 == 0), bits + step, bits).view(np.float64)


def _product_error(a: FloatArray, b: FloatArray, product: FloatArray) -> FloatArray:
    """Return ``a * b - product`` exactly, where :func:`_is_moderate` holds for both (Veltkamp, Dekker)."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(value: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Split a float64 into two parts of at most 26 bits."""
    scaled = value * (2.0**27 + 1.0)
    high = scaled - (scaled - value)
    return high, value - high


def _is_moderate(value: FloatArray) -> NDArray[np.bool_]:
    """Return where the magnitude lies between 2^-450 and 2^450."""
    magnitude = np.abs(value)
    return (magnitude > 2.0**-450) & (magnitude < 2.0**450)


def _fma_exact(a: float, b: float, c: float) -> float:
    """Return ``a * b + c`` rounded once, for finite operands with a nonzero product."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)  # division of two integers, which Python rounds correctly; subnormals included
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _to_native(raw: Raw, dtype: DType) -> NDArray[Any]:
    """View ``raw`` as NumPy's own dtype; bfloat16, which NumPy lacks, as the float32 of the same value."""
    _check_mergeable(dtype)
    if dtype is BF16:
        bits: NDArray[np.uint32] = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return raw.view(np.dtype(dtype.numpy_name))


def _chunks(operands: Sequence[Operand]) -> Iterator[list[Operand]]:
    """Cut the operands of one tensor into pieces of ``CHUNK_NUMEL`` elements."""
    for start in range(0, _numel(operands), CHUNK_NUMEL):
        yield [(raw[start * dtype.itemsize : (start + CHUNK_NUMEL) * dtype.itemsize], dtype) for raw, dtype in operands]


def _numel(operands: Sequence[Operand]) -> int:
    """Return the number of elements that all operands of one tensor have."""
    sizes = []
    for raw, dtype in operands:
        _check_mergeable(dtype)
        numel, left_over = divmod(raw.size, dtype.itemsize)
        if left_over:
            raise PlanError(
                "bytes that are no whole number of elements",
                got=raw.size,
                expected=f"a multiple of {dtype.itemsize}",
            )
        sizes.append(numel)
    if len(set(sizes)) != 1:
        raise PlanError("operands of one tensor differ in length", got=sizes, expected="equal numel")
    return sizes[0]


def _check_mergeable(dtype: DType) -> None:
    if not dtype.is_mergeable:
        names = ", ".join(map(str, MERGEABLE))
        raise PlanError("dtype cannot be merged", where="reference", got=dtype, expected=names)
