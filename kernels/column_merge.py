"""column_merge: layer_merge with the coefficients of the element's column, for tensors seen as [R, C]."""

import triton
import triton.language as tl

from .elements import locate
from .layer_merge import merge_tile


@triton.jit(do_not_specialize=["tiles_per_entry"])
def column_merge_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, address of the output
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    lines_ptr,  # int64 [rows, 2]: C, address of the coefficients: fp64 [C, T]
    nonfinite_ptr,  # int64 [rows], added to
    DTYPES: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge one tile."""
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    columns = tl.load(lines_ptr + 2 * row)
    coefficients = tl.load(lines_ptr + 2 * row + 1).to(tl.pointer_type(tl.float64))
    unchanged = tl.full([], False, tl.int1)
    count = tl.full([], 0, tl.int32)
    if start < numel:
        count = merge_tile(
            record, coefficients, columns, unchanged, start, offsets, numel,
            DTYPES, OUT_DTYPE, HAS_BASE, ALIGNMENT, True, WIDE, True,
        )  # fmt: skip
    if count > 0:
        tl.atomic_add(nonfinite_ptr + row, count.to(tl.int64))
