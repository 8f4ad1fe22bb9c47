"""layer_gram: gram[k, i, j] += Σ_e v_i[e] v_j[e], v = [base, τ_1 ... τ_T], τ_t = model_t − base.

Three kernels. The first sums a tile: deltas and products in fp32, a fixed tree within the tile. The second sums tiles
in fp64: all where F64 is among the operands, else those whose squares left fp32's range, which the first one lists. The
third adds the tiles of a tensor in fp64, in a fixed order. No float atomics: the same bits in every run. Against the
CPU's the sums differ in their order, by less than 1e-6 relative to √(G_ii G_jj).
"""

import triton
import triton.language as tl

from .elements import load_values, locate

# Within these bounds squares neither overflowed nor lost anything that counts to underflow: docs/numerics.md.
_LEAST_RELIABLE_SUM = tl.constexpr(2.0**-80)
_GREATEST_RELIABLE_SUM = tl.constexpr(2.0**100)


@triton.jit
def _vectors(
    record,
    start,
    offsets,
    numel,
    DTYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the tuple of v_i for a tile; zeros past the end where MASKED."""
    first = load_values(tl.load(record + 2), start, offsets, numel, DTYPES[0], ALIGNMENT, MASKED, WIDE)
    vectors = (first,)
    for t in tl.static_range(1, len(DTYPES)):
        x = load_values(tl.load(record + 2 + t), start, offsets, numel, DTYPES[t], ALIGNMENT, MASKED, WIDE)
        if HAS_BASE:
            x = x - first
        vectors = vectors + (x,)
    return vectors


@triton.jit
def _stack(parts, LANES: tl.constexpr, SIZE: tl.constexpr):
    """Return a tuple of SIZE = 2^n tensors [LANES] as one tensor [LANES, SIZE]."""
    stacked = parts
    for _ in tl.static_range(10):
        if len(stacked) > 1:
            joined = (tl.join(stacked[0], stacked[len(stacked) // 2]),)
            for m in tl.static_range(1, len(stacked) // 2):
                joined = joined + (tl.join(stacked[m], stacked[m + len(stacked) // 2]),)
            stacked = joined
    return tl.reshape(stacked[0], [LANES, SIZE])


@triton.jit
def _thread_sums(a, b, LANES: tl.constexpr, RUN: tl.constexpr):
    """Return Σ a b over runs of RUN adjacent elements, LANES runs apart: [LANES], one per thread."""
    runs: tl.constexpr = a.shape[0] // (LANES * RUN)
    return tl.sum(tl.sum(tl.reshape(a * b, [runs, LANES, RUN]), axis=2), axis=0)


@triton.jit
def _pair_sums(vectors, LANES: tl.constexpr, RUN: tl.constexpr, PAIRS: tl.constexpr):
    """Return Σ v_i v_j for i ≤ j, row by row: [PAIRS], of which the first V(V+1)/2 count.

    A thread adds up what it has loaded itself; then one reduction over threads serves all pairs.
    """
    parts = (_thread_sums(vectors[0], vectors[0], LANES, RUN),)
    for i in tl.static_range(len(vectors)):
        for j in tl.static_range(i, len(vectors)):
            if j > 0:
                parts = parts + (_thread_sums(vectors[i], vectors[j], LANES, RUN),)
    for _ in tl.static_range(len(vectors) * (len(vectors) + 1) // 2, PAIRS):
        parts = parts + (tl.zeros_like(parts[0]),)
    return tl.sum(_stack(parts, LANES, PAIRS), axis=0)


@triton.jit
def _square_of(pair, NUM_OPERANDS: tl.constexpr):
    """Return which operand's square a pair is, -1 where it is none."""
    operand = tl.full(pair.shape, -1, tl.int32)
    for i in tl.static_range(NUM_OPERANDS):
        operand = tl.where(pair == i * NUM_OPERANDS - i * (i - 1) // 2, i, operand)
    return operand


@triton.jit
def _store_sums(partials_ptr, num_programs, program, sums, NUM_OPERANDS: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    where = partials_ptr + pair.to(tl.int64) * num_programs + program
    tl.store(where, sums.to(tl.float64), mask=pair < NUM_OPERANDS * (NUM_OPERANDS + 1) // 2)


@triton.jit(do_not_specialize=["tiles_per_entry", "num_programs"])
def layer_gram_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, one more that is not used
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    partials_ptr,  # fp64 [V(V+1)/2, num_programs]
    num_programs,
    doubtful_ptr,  # int32 [1 + num_programs]: how many tiles have to be summed in fp64, and which
    DTYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # threads
    RUN: tl.constexpr,  # adjacent elements that a thread loads at a time
    PAIRS: tl.constexpr,  # V(V+1)/2, up to a power of two
):
    """Sum one tile in fp32."""
    num_operands: tl.constexpr = len(DTYPES)
    program = tl.program_id(0)
    tensor, start = locate(entries_ptr, tiles_per_entry, program, BLOCK)
    record = records_ptr + tensor * (num_operands + 3)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        vectors = _vectors(record, start, offsets, numel, DTYPES, HAS_BASE, ALIGNMENT, False, False)
    else:
        vectors = _vectors(record, start, offsets, numel, DTYPES, HAS_BASE, ALIGNMENT, True, False)
    sums = _pair_sums(vectors, LANES, RUN, PAIRS)
    _store_sums(partials_ptr, num_programs, program, sums, num_operands, PAIRS)

    square_of = _square_of(tl.arange(0, PAIRS), num_operands)
    is_reliable = (sums >= _LEAST_RELIABLE_SUM) & (sums <= _GREATEST_RELIABLE_SUM)
    is_doubtful = (square_of >= 0) & ~is_reliable
    if tl.sum(is_doubtful.to(tl.int32)) > 0:
        # A sum of 0 is right where the vector is 0 throughout: a tensor that a model left as it was.
        for i in tl.static_range(num_operands):
            is_zero = tl.sum((vectors[i] != 0).to(tl.int32)) == 0
            is_doubtful = is_doubtful & ~((square_of == i) & is_zero)
        if tl.sum(is_doubtful.to(tl.int32)) > 0:
            place = tl.atomic_add(doubtful_ptr, 1)
            tl.store(doubtful_ptr + 1 + place, program)


@triton.jit(do_not_specialize=["tiles_per_entry", "num_programs"])
def layer_gram_wide_kernel(
    records_ptr,
    entries_ptr,
    tiles_per_entry,
    partials_ptr,
    num_programs,
    doubtful_ptr,
    DTYPES: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # elements at a time
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
    EVERY: tl.constexpr,  # all tiles, one per program, and not those that are listed
):
    """Sum tiles in fp64; arguments as for ``layer_gram_kernel``."""
    num_operands: tl.constexpr = len(DTYPES)
    offsets = tl.arange(0, CHUNK)
    begin = tl.program_id(0)
    end = begin + 1
    if not EVERY:
        end = tl.load(doubtful_ptr)
    for i in range(begin, end, tl.num_programs(0)):
        program = i
        if not EVERY:
            program = tl.load(doubtful_ptr + 1 + i)
        tensor, start = locate(entries_ptr, tiles_per_entry, program, BLOCK)
        record = records_ptr + tensor * (num_operands + 3)
        numel = tl.load(record + 1)
        sums = tl.zeros([PAIRS], tl.float64)
        for chunk in range(0, BLOCK, CHUNK):
            first = start + chunk
            if first + CHUNK <= numel:
                vectors = _vectors(record, first, offsets, numel, DTYPES, HAS_BASE, ALIGNMENT, False, True)
            else:
                vectors = _vectors(record, first, offsets, numel, DTYPES, HAS_BASE, ALIGNMENT, True, True)
            sums += _pair_sums(vectors, LANES, RUN, PAIRS)
        _store_sums(partials_ptr, num_programs, program, sums, num_operands, PAIRS)


@triton.jit(do_not_specialize=["num_programs"])
def layer_gram_reduce_kernel(
    records_ptr,  # int64 [K, STRIDE]: row, ...
    first_programs_ptr,  # int64 [K + 1]
    partials_ptr,  # fp64 [pairs, num_programs]
    num_programs,
    targets_ptr,  # int64 [pairs, 2]: where in a row's matrix the sum goes, and its mirror image; -1 where nobody asks
    gram_ptr,  # fp64 [rows, MATRIX]
    STRIDE: tl.constexpr,
    MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add the partial sums of one pair of one tensor to its Gram matrix."""
    tensor = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    target = tl.load(targets_ptr + 2 * pair)
    mirror = tl.load(targets_ptr + 2 * pair + 1)
    row = tl.load(records_ptr + tensor * STRIDE)
    begin = tl.load(first_programs_ptr + tensor)
    end = tl.load(first_programs_ptr + tensor + 1)
    offsets = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float64)
    for first in range(begin, end, WIDTH):
        where = partials_ptr + pair * num_programs + first + offsets
        sums += tl.load(where, mask=offsets < end - first, other=0.0)
    if target >= 0:
        entry = gram_ptr + row * MATRIX + target
        total = tl.load(entry) + tl.sum(sums)
        tl.store(entry, total)
        if mirror != target:
            tl.store(gram_ptr + row * MATRIX + mirror, total)
