"""Elements of any dtype at any address: loads that widen, stores that round once. Functions for kernels.

Dtype codes are those of metagpt_fast.dtypes. Arithmetic is fp32, or fp64 where WIDE. The 16-bit formats are handled in
integers, so that the bits are the same on every device and in Triton's interpreter.
"""

import triton
import triton.language as tl

F32 = tl.constexpr(0)
F16 = tl.constexpr(1)
BF16 = tl.constexpr(2)
F64 = tl.constexpr(3)
BYTES = tl.constexpr(1)
VECTOR = tl.constexpr(16)


@triton.jit
def locate(entries_ptr, tiles_per_entry, program, BLOCK: tl.constexpr):
    """Return a program's tensor, as its place in the table of records, and its first element: int64 scalars."""
    entry = entries_ptr + 2 * (program // tiles_per_entry)
    tensor = tl.load(entry)
    start = (tl.load(entry + 1) + program % tiles_per_entry) * BLOCK
    return tensor, start


@triton.jit
def pointers(address, start, offsets, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return pointers to elements ``start + offsets``: to integers of their size, or to floats from 32 bits on.

    With VECTOR every address is a multiple of 16, and so is that of a tile: the hint makes loads 16 bytes wide.
    """
    if DTYPE == F32:
        p = (address + start * 4).to(tl.pointer_type(tl.float32)) + offsets
    elif DTYPE == F64:
        p = (address + start * 8).to(tl.pointer_type(tl.float64)) + offsets
    else:
        p = (address + start * 2).to(tl.pointer_type(tl.int16)) + offsets
    if ALIGNMENT == VECTOR:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def load_byte_by_byte(address, start, offsets, mask, NBYTES: tl.constexpr, INT: tl.constexpr):
    """Return little-endian integers that lie at any address."""
    p = (address + start * NBYTES).to(tl.pointer_type(tl.uint8)) + offsets * NBYTES
    bits = tl.load(p, mask=mask, other=0).to(INT)
    for byte in tl.static_range(1, NBYTES):
        bits |= tl.load(p + byte, mask=mask, other=0).to(INT) << (8 * byte)
    return bits


@triton.jit
def store_byte_by_byte(address, start, offsets, bits, mask, NBYTES: tl.constexpr):
    """Store little-endian integers at any address."""
    p = (address + start * NBYTES).to(tl.pointer_type(tl.uint8)) + offsets * NBYTES
    for byte in tl.static_range(NBYTES):
        tl.store(p + byte, (bits >> (8 * byte)).to(tl.uint8), mask=mask)


@triton.jit
def load_values(
    address,
    start,
    offsets,
    numel,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return elements ``start + offsets`` as fp32, or fp64 where WIDE; zeros past the end where MASKED.

    Args:
        address: int64 scalar, the operand's first byte.
        start: int64 scalar, the tile's first element.
        offsets: int32 [BLOCK].
        numel: int64 scalar, elements of the tensor.
        DTYPE: of the operand.
        ALIGNMENT: VECTOR, NATURAL or BYTES.
        MASKED: whether the tile may end after the tensor does. Without it no load is masked, and all are wide.
        WIDE: whether the arithmetic is fp64.
    """
    mask = offsets < numel - start
    if ALIGNMENT == BYTES:
        if DTYPE == F64:
            x = load_byte_by_byte(address, start, offsets, mask, 8, tl.int64).to(tl.float64, bitcast=True)
        elif DTYPE == F32:
            x = load_byte_by_byte(address, start, offsets, mask, 4, tl.int32).to(tl.float32, bitcast=True)
        else:
            x = load_byte_by_byte(address, start, offsets, mask, 2, tl.int32).to(tl.int16)
    elif MASKED:
        x = tl.load(pointers(address, start, offsets, DTYPE, ALIGNMENT), mask=mask, other=0)
    else:
        x = tl.load(pointers(address, start, offsets, DTYPE, ALIGNMENT))
    if DTYPE == BF16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == F16:
        x = x.to(tl.float16, bitcast=True).to(tl.float32)
    if WIDE:
        x = x.to(tl.float64)
    return x


@triton.jit
def round_to_odd(x):
    """Return fp64 values as fp32, rounded to odd, so that a second rounding to 16 bits is as good as one.

    Nearest first; where that is not exact and its last bit is even, the neighbour on the other side of x is the odd
    one. Inf from a finite x becomes the largest fp32, which is odd.
    """
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    back = nearest.to(tl.float64)
    # Comparisons of magnitudes: the bits of either sign grow with them.
    step = tl.where(tl.abs(back) > tl.abs(x), -1, 1)
    is_inexact = (back != x) & (x == x)
    return tl.where(is_inexact & ((bits & 1) == 0), bits + step, bits).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """Return fp32 values rounded to bfloat16, to nearest, ties to even: int32, of which the low 16 bits count."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0)


@triton.jit
def store_rounded(
    address, start, offsets, numel, x, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, MASKED: tl.constexpr
):
    """Round x, fp32 or fp64, once to DTYPE and store it; return how many elements became NaN or Inf, int32."""
    mask = offsets < numel - start
    if DTYPE == F64:
        bits = x.to(tl.float64).to(tl.int64, bitcast=True)
        is_nonfinite = (bits & 0x7FFFFFFFFFFFFFFF) >= 0x7FF0000000000000
        if ALIGNMENT != BYTES:
            values = bits.to(tl.float64, bitcast=True)
    elif DTYPE == F32:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        is_nonfinite = (bits & 0x7FFFFFFF) >= 0x7F800000
        values = bits.to(tl.float32, bitcast=True)
    else:
        if x.dtype == tl.float64:
            x = round_to_odd(x)
        if DTYPE == BF16:
            bits = bf16_bits(x)
            is_nonfinite = (bits & 0x7F80) == 0x7F80
        else:
            bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            is_nonfinite = (bits & 0x7C00) == 0x7C00
        values = bits.to(tl.int16)
    if ALIGNMENT == BYTES:
        if DTYPE == F64:
            store_byte_by_byte(address, start, offsets, bits, mask, 8)
        elif DTYPE == F32:
            store_byte_by_byte(address, start, offsets, bits, mask, 4)
        else:
            store_byte_by_byte(address, start, offsets, bits, mask, 2)
    elif MASKED:
        tl.store(pointers(address, start, offsets, DTYPE, ALIGNMENT), values, mask=mask)
    else:
        tl.store(pointers(address, start, offsets, DTYPE, ALIGNMENT), values)
    if MASKED:
        is_nonfinite = is_nonfinite & mask
    return tl.sum(is_nonfinite.to(tl.int32))
