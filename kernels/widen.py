"""widen: the operands of a tensor as fp64, for what torch's own operations do."""

import triton
import triton.language as tl

from .elements import load_values, locate


@triton.jit(do_not_specialize=["tiles_per_entry"])
def widen_kernel(
    records_ptr,  # int64 [1, V + 3]: row, numel, addresses of the operands, one more that is not used
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    out_ptr,  # fp64 [V, numel]
    DTYPES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convert one tile of every operand of a layer that is one tensor."""
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    for v in tl.static_range(len(DTYPES)):
        x = load_values(tl.load(record + 2 + v), start, offsets, numel, DTYPES[v], ALIGNMENT, True, True)
        tl.store(out_ptr + v * numel + start + offsets, x, mask=offsets < numel - start)
