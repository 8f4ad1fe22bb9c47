"""layer_nonfinite: how many NaN and Inf each operand has, and where the first is. Integer atomics are in any order."""

import triton
import triton.language as tl

from .elements import F64, load_values, locate


@triton.jit(do_not_specialize=["tiles_per_entry"])
def layer_nonfinite_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, one more that is not used
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    counts_ptr,  # int64 [rows, V], added to
    firsts_ptr,  # int64 [rows, V], lowered
    DTYPES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look at one tile of every operand."""
    num_operands: tl.constexpr = len(DTYPES)
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (num_operands + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    for v in tl.static_range(num_operands):
        address = tl.load(record + 2 + v)
        x = load_values(address, start, offsets, numel, DTYPES[v], ALIGNMENT, True, DTYPES[v] == F64)
        is_nonfinite = ~(tl.abs(x) < float("inf"))
        count = tl.sum(is_nonfinite.to(tl.int32))
        if count > 0:
            first = tl.min(tl.where(is_nonfinite, offsets, BLOCK))
            tl.atomic_add(counts_ptr + row * num_operands + v, count.to(tl.int64))
            tl.atomic_min(firsts_ptr + row * num_operands + v, start + first)
