"""layer_threshold: the element of a rank, larger keys first and lower indices first among equal ones; all in integers.

Four passes over the tensor look at 8 bits of the keys each, from the top: a histogram of the elements that share the
bits found so far, then one step down. A last pass counts the equal ones tile by tile, to find the index. Nothing is
sorted.
"""

import triton
import triton.language as tl

from .elements import locate
from .masks import keys_of, load_deltas

BITS = tl.constexpr(8)
BINS = tl.constexpr(256)


@triton.jit
def _tile_keys(
    record,
    lines_ptr,
    row,
    start,
    offsets,
    numel,
    model: tl.constexpr,
    DTYPES: tl.constexpr,
    KEY_KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.load(lines_ptr + 2 * row)
    row_factors = tl.load(lines_ptr + 2 * row + 1)
    _, deltas = load_deltas(record, start, offsets, numel, DTYPES, ALIGNMENT, WIDE, BLOCK)
    return keys_of(deltas, model, start, offsets, numel, columns, row_factors, KEY_KIND)


@triton.jit(do_not_specialize=["tiles_per_entry", "shift"])
def layer_threshold_histogram_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, one more that is not used
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    lines_ptr,  # int64 [rows, 2]: elements per row, address of row factors
    states_ptr,  # int64 [rows, J, R, 2]: bits of the key found so far, rank among those that share them (-1: none)
    histograms_ptr,  # int64 [rows, J, R, BINS], added to
    shift,  # bits of the key below those that are looked at
    DTYPES: tl.constexpr,
    KEY_KIND: tl.constexpr,
    NUM_KEYS: tl.constexpr,  # J
    NUM_RANKS: tl.constexpr,  # R
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the keys of one tile by the next 8 bits."""
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    for j in tl.static_range(NUM_KEYS):
        key = _tile_keys(record, lines_ptr, row, start, offsets, numel, j, DTYPES, KEY_KIND, WIDE, ALIGNMENT, BLOCK).to(
            tl.int64
        )
        for r in tl.static_range(NUM_RANKS):
            state = ((row * NUM_KEYS + j) * NUM_RANKS + r) * 2
            if tl.load(states_ptr + state + 1) >= 0:
                is_wanted = (offsets < numel - start) & ((key >> (shift + BITS)) == tl.load(states_ptr + state))
                counts = tl.histogram(((key >> shift) & (BINS - 1)).to(tl.int32), BINS, mask=is_wanted)
                where = histograms_ptr + state // 2 * BINS + bins
                tl.atomic_add(where, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def layer_threshold_step_kernel(
    states_ptr,  # int64 [N, 2], updated
    histograms_ptr,  # int64 [N, BINS], set back to 0
):
    """Find the bin that has the rank: add its bits to the key, take what lies above it off the rank."""
    state = states_ptr + tl.program_id(0).to(tl.int64) * 2
    bins = tl.arange(0, BINS)
    where = histograms_ptr + tl.program_id(0).to(tl.int64) * BINS + bins
    counts = tl.load(where)
    rank = tl.load(state + 1)
    above = tl.sum(counts) - tl.cumsum(counts)  # elements in higher bins
    is_found = (above <= rank) & (rank < above + counts)
    if rank >= 0:
        found = tl.sum(tl.where(is_found, bins, 0).to(tl.int64))
        tl.store(state, (tl.load(state) << BITS) | found)
        tl.store(state + 1, rank - tl.sum(tl.where(is_found, above, 0)))
    tl.store(where, tl.zeros_like(counts))


@triton.jit(do_not_specialize=["tiles_per_entry", "num_programs"])
def layer_threshold_ties_kernel(
    records_ptr,
    entries_ptr,
    tiles_per_entry,
    lines_ptr,
    states_ptr,  # int64 [rows, J, R, 2]: the key, rank among those that have it
    ties_ptr,  # int32 [J, R, num_programs]
    num_programs,
    DTYPES: tl.constexpr,
    KEY_KIND: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the elements of one tile that have the key."""
    program = tl.program_id(0)
    tensor, start = locate(entries_ptr, tiles_per_entry, program, BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    for j in tl.static_range(NUM_KEYS):
        key = _tile_keys(record, lines_ptr, row, start, offsets, numel, j, DTYPES, KEY_KIND, WIDE, ALIGNMENT, BLOCK)
        for r in tl.static_range(NUM_RANKS):
            wanted = tl.load(states_ptr + ((row * NUM_KEYS + j) * NUM_RANKS + r) * 2)
            is_tie = (offsets < numel - start) & (key.to(tl.int64) == wanted)
            where = ties_ptr + tl.cast(num_programs, tl.int64) * (j * NUM_RANKS + r) + program
            tl.store(where, tl.sum(is_tie.to(tl.int32)))


@triton.jit(do_not_specialize=["tiles_per_entry", "num_programs"])
def layer_threshold_index_kernel(
    records_ptr,
    entries_ptr,
    tiles_per_entry,
    first_programs_ptr,  # int64 [K + 1]
    lines_ptr,
    states_ptr,
    ties_ptr,
    num_programs,
    indices_ptr,  # int64 [rows, J, R]
    DTYPES: tl.constexpr,
    KEY_KIND: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Find the tile, and in it the element, of one rank of one tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    begin = tl.load(first_programs_ptr + tensor)
    end = tl.load(first_programs_ptr + tensor + 1)
    offsets = tl.arange(0, BLOCK)
    lanes = tl.arange(0, WIDTH)
    for j in tl.static_range(NUM_KEYS):
        for r in tl.static_range(NUM_RANKS):
            result = (row * NUM_KEYS + j) * NUM_RANKS + r
            wanted = tl.load(states_ptr + 2 * result)
            rank = tl.load(states_ptr + 2 * result + 1)
            if rank >= 0:
                before = tl.full([], 0, tl.int64)  # ties in the tiles that were looked at
                program = begin
                skipped = before
                for first in range(begin, end, WIDTH):
                    where = ties_ptr + tl.cast(num_programs, tl.int64) * (j * NUM_RANKS + r) + first + lanes
                    counts = tl.load(where, mask=lanes < end - first, other=0).to(tl.int64)
                    ends = before + tl.cumsum(counts)
                    is_tile = (ends - counts <= rank) & (rank < ends)
                    program += tl.sum(tl.where(is_tile, first - begin + lanes, 0))
                    skipped += tl.sum(tl.where(is_tile, ends - counts, 0))
                    before += tl.sum(counts)
                _, start = locate(entries_ptr, tiles_per_entry, program, BLOCK)
                key = _tile_keys(
                    record, lines_ptr, row, start, offsets, numel, j, DTYPES, KEY_KIND, WIDE, ALIGNMENT, BLOCK
                )
                is_tie = (offsets < numel - start) & (key.to(tl.int64) == wanted)
                number = skipped + tl.cumsum(is_tie.to(tl.int32)).to(tl.int64)
                is_element = is_tie & (number == rank + 1)
                tl.store(indices_ptr + result, start + tl.sum(tl.where(is_element, offsets, 0)))


@triton.jit(do_not_specialize=["tiles_per_entry"])
def layer_count_nonzero_kernel(
    records_ptr,
    entries_ptr,
    tiles_per_entry,
    lines_ptr,
    counts_ptr,  # int64 [rows, J], added to
    DTYPES: tl.constexpr,
    KEY_KIND: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the keys of one tile that are above 0."""
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    for j in tl.static_range(NUM_KEYS):
        key = _tile_keys(record, lines_ptr, row, start, offsets, numel, j, DTYPES, KEY_KIND, WIDE, ALIGNMENT, BLOCK)
        count = tl.sum(((offsets < numel - start) & (key > 0)).to(tl.int32))
        if count > 0:
            tl.atomic_add(counts_ptr + row * NUM_KEYS + j, count.to(tl.int64))


@triton.jit(do_not_specialize=["tiles_per_entry"])
def layer_keys_kernel(
    records_ptr,
    entries_ptr,
    tiles_per_entry,
    lines_ptr,
    keys_ptr,  # int32 [numel] of the one tensor
    DTYPES: tl.constexpr,
    MODEL: tl.constexpr,
    KEY_KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the keys of one tile of a layer that is one tensor."""
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    key = _tile_keys(record, lines_ptr, row, start, offsets, numel, MODEL, DTYPES, KEY_KIND, WIDE, ALIGNMENT, BLOCK)
    tl.store(keys_ptr + start + offsets, key, mask=offsets < numel - start)
