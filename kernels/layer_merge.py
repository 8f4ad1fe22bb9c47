"""layer_merge: out = round(fma(c_{T-1}, τ_{T-1}, ... fma(c_0, τ_0, base))), τ_t = model_t − base.

fp32, coefficients rounded to it once (fp64 throughout where F64 is among operands or output); one fma per model, in
order; one rounding at the end. The bits are the CPU's: docs/numerics.md.
"""

import triton
import triton.language as tl

from .elements import load_values, locate, store_rounded


@triton.jit
def merge_tile(
    record,
    coefficients,
    columns,
    unchanged,
    start,
    offsets,
    numel,
    DTYPES: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    """Merge one tile with coefficients [T], or [columns, T] where PER_COLUMN; return how many NaN and Inf it wrote."""
    scalar = tl.float64 if WIDE else tl.float32
    total = tl.full(offsets.shape, -0.0, scalar)  # c·x + (−0) is c·x for either sign of zero
    base = total
    if HAS_BASE:
        base = load_values(tl.load(record + 2), start, offsets, numel, DTYPES[0], ALIGNMENT, MASKED, WIDE)
        total = base
    for t in tl.static_range(HAS_BASE, len(DTYPES)):
        delta = load_values(tl.load(record + 2 + t), start, offsets, numel, DTYPES[t], ALIGNMENT, MASKED, WIDE)
        if HAS_BASE:
            delta = delta - base
        if PER_COLUMN:
            column = (start + offsets) % columns
            coefficient = tl.load(coefficients + column * (len(DTYPES) - HAS_BASE) + (t - HAS_BASE)).to(scalar)
        else:
            coefficient = tl.broadcast_to(tl.load(coefficients + (t - HAS_BASE)).to(scalar), offsets.shape)
        total = tl.fma(coefficient, delta, total)
    total = tl.where(unchanged, base, total)
    out = tl.load(record + 2 + len(DTYPES))
    return store_rounded(out, start, offsets, numel, total, OUT_DTYPE, ALIGNMENT, MASKED)


@triton.jit(do_not_specialize=["tiles_per_entry"])
def layer_merge_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, address of the output
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    coefficients_ptr,  # fp64 [rows, T]
    gram_ptr,  # fp64 [rows, V, V], read where KEEPS
    nonfinite_ptr,  # int64 [rows]: how many NaN and Inf were written is added to it
    DTYPES: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    KEEPS: tl.constexpr,  # whether a tensor that no model changed (by its Gram matrix) keeps its bits
    WIDE: tl.constexpr,  # whether F64 is among operands and output
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge one tile."""
    num_operands: tl.constexpr = len(DTYPES)
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (num_operands + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    coefficients = coefficients_ptr + row * (num_operands - HAS_BASE)
    unchanged = tl.full([], False, tl.int1)
    if KEEPS:
        unchanged = tl.full([], True, tl.int1)
        for i in tl.static_range(1, num_operands):
            square = tl.load(gram_ptr + (row * num_operands + i) * num_operands + i)
            unchanged = unchanged & (square == 0)
    count = tl.full([], 0, tl.int32)
    if start + BLOCK <= numel:
        count = merge_tile(
            record,
            coefficients,
            1,
            unchanged,
            start,
            offsets,
            numel,
            DTYPES,
            OUT_DTYPE,
            HAS_BASE,
            ALIGNMENT,
            False,
            WIDE,
            False,
        )
    elif start < numel:
        count = merge_tile(
            record,
            coefficients,
            1,
            unchanged,
            start,
            offsets,
            numel,
            DTYPES,
            OUT_DTYPE,
            HAS_BASE,
            ALIGNMENT,
            True,
            WIDE,
            False,
        )
    if count > 0:
        tl.atomic_add(nonfinite_ptr + row, count.to(tl.int64))
