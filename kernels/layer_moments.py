"""layer_moments: sums over masked task vectors, per model: kept, Σ|δ|, Σ|δ|m, Σδ², Σ(δm)², kept by this model alone.

fp64. A tile's sums are added up by ``layer_gram_reduce_kernel``, in a fixed order.
"""

import triton
import triton.language as tl

from .elements import locate
from .masks import FIELDS, load_deltas, mask_of

MOMENTS = tl.constexpr(6)


@triton.jit(do_not_specialize=["tiles_per_entry", "num_programs"])
def layer_moments_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, one more that is not used
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    fields_ptr,  # int64 [rows, T, FIELDS]: masks
    lines_ptr,  # int64 [rows, 2]: elements per row, address of row factors
    partials_ptr,  # fp64 [T * 6, num_programs]
    num_programs,
    DTYPES: tl.constexpr,
    KINDS: tl.constexpr,
    KEY_KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one tile."""
    num_models: tl.constexpr = len(KINDS)
    program = tl.program_id(0)
    tensor, start = locate(entries_ptr, tiles_per_entry, program, BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    columns = tl.load(lines_ptr + 2 * row)
    row_factors = tl.load(lines_ptr + 2 * row + 1)
    _, deltas = load_deltas(record, start, offsets, numel, DTYPES, ALIGNMENT, WIDE, BLOCK)
    num_keeping = tl.zeros([BLOCK], tl.int32)
    keeps = ()
    for t in tl.static_range(num_models):
        fields = fields_ptr + (row * num_models + t) * FIELDS
        kept, weight = mask_of(
            deltas, t, fields, start, offsets, numel, columns, row_factors, KINDS[t], KEY_KIND, BLOCK
        )
        keeps = keeps + (kept,)
        num_keeping += kept.to(tl.int32)
        magnitude = tl.abs(deltas[t].to(tl.float64))
        masked = tl.where(kept, magnitude * weight, 0.0)
        where = partials_ptr + tl.cast(num_programs, tl.int64) * (t * MOMENTS) + program
        tl.store(where, tl.sum(kept.to(tl.int32)).to(tl.float64))
        tl.store(where + num_programs, tl.sum(magnitude))
        tl.store(where + 2 * num_programs, tl.sum(masked))
        tl.store(where + 3 * num_programs, tl.sum(magnitude * magnitude))
        tl.store(where + 4 * num_programs, tl.sum(masked * masked))
    for t in tl.static_range(num_models):
        alone = keeps[t] & (num_keeping == 1)
        where = partials_ptr + tl.cast(num_programs, tl.int64) * (t * MOMENTS + 5) + program
        tl.store(where, tl.sum(alone.to(tl.int32)).to(tl.float64))
