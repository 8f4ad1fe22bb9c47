"""layer_elect: out = base + λ · Σ (scale δ) m / Σ weight over the models that count at an element.

fp64, one rounding per operation and no fma, in the order of the models; λ · Σ/Σ is rounded to the deltas' format and
added to the base there. The bits are the CPU's.
"""

import triton
import triton.language as tl

from .elements import locate, store_rounded
from .masks import FIELDS, NEAR, load_deltas, mask_of


@triton.jit
def _term(delta, kept, weight, factor, KIND: tl.constexpr):
    term = factor * delta.to(tl.float64)
    if KIND == NEAR:
        term = term * weight
    return tl.where(kept, term, 0.0)


@triton.jit
def _elect_tile(
    record,
    fields,
    election,
    rule,
    columns,
    row_factors,
    start,
    offsets,
    numel,
    DTYPES: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    KEY_KIND: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_models: tl.constexpr = len(KINDS)
    base, deltas = load_deltas(record, start, offsets, numel, DTYPES, ALIGNMENT, WIDE, BLOCK)
    votes = tl.zeros([BLOCK], tl.float64)
    terms = ()
    keeps = ()
    for t in tl.static_range(num_models):
        kept, weight = mask_of(
            deltas, t, fields + t * FIELDS, start, offsets, numel, columns, row_factors, KINDS[t], KEY_KIND, BLOCK
        )
        votes = votes + _term(deltas[t], kept, weight, tl.load(election + num_models + t), KINDS[t])
        terms = terms + (_term(deltas[t], kept, weight, tl.load(election + t), KINDS[t]),)
        keeps = keeps + (kept,)
    elects = tl.load(rule + 2) != 0
    total = tl.zeros([BLOCK], tl.float64)
    divisor = tl.zeros([BLOCK], tl.float64)
    num_counting = tl.zeros([BLOCK], tl.int32)
    unique = tl.zeros([BLOCK], tl.float64)
    for t in tl.static_range(num_models):
        # A NaN counts: it is neither below nor above zero.
        agrees = ~tl.where(votes >= 0, terms[t] <= 0, terms[t] >= 0)
        counts = tl.where(elects, agrees, keeps[t])
        total = total + tl.where(counts, terms[t], 0.0)
        divisor = divisor + tl.where(counts, tl.load(election + 2 * num_models + t), 0.0)
        num_counting += counts.to(tl.int32)
        unique = tl.where(counts, tl.load(election + 3 * num_models + t), unique)
    total = tl.where(num_counting == 1, total * unique, total)
    divisor = tl.where(tl.load(rule + 3) != 0, divisor, 1.0)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    floor = tl.load(rule + 1)
    floor = tl.where(floor > 0, floor, -float("inf"))
    divisor = tl.where(divisor < floor, floor, divisor)
    change = (tl.load(rule) * (total / divisor)).to(base.dtype)
    merged = tl.where(change == 0, base, base + change)
    out = tl.load(record + 2 + len(DTYPES))
    if start + BLOCK <= numel:
        count = store_rounded(out, start, offsets, numel, merged, OUT_DTYPE, ALIGNMENT, False)
    else:
        count = store_rounded(out, start, offsets, numel, merged, OUT_DTYPE, ALIGNMENT, True)
    return count


@triton.jit(do_not_specialize=["tiles_per_entry"])
def layer_elect_kernel(
    records_ptr,  # int64 [K, V + 3]: row, numel, addresses of the operands, address of the output
    entries_ptr,  # int64 [E, 2]: tensor, first tile
    tiles_per_entry,
    fields_ptr,  # int64 [rows, T, FIELDS]: masks
    lines_ptr,  # int64 [rows, 2]: elements per row, address of row factors
    elections_ptr,  # fp64 [rows, 4, T]: scales, votes, weights, uniques
    rules_ptr,  # fp64 [rows, 4]: λ, floor, elects, normalizes
    nonfinite_ptr,  # int64 [rows], added to
    DTYPES: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    KINDS: tl.constexpr,  # of the masks, by model
    KEY_KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge one tile."""
    num_models: tl.constexpr = len(KINDS)
    tensor, start = locate(entries_ptr, tiles_per_entry, tl.program_id(0), BLOCK)
    record = records_ptr + tensor * (len(DTYPES) + 3)
    row = tl.load(record)
    numel = tl.load(record + 1)
    offsets = tl.arange(0, BLOCK)
    fields = fields_ptr + row * num_models * FIELDS
    election = elections_ptr + row * 4 * num_models
    rule = rules_ptr + row * 4
    columns = tl.load(lines_ptr + 2 * row)
    row_factors = tl.load(lines_ptr + 2 * row + 1)
    count = tl.full([], 0, tl.int32)
    if start < numel:
        count = _elect_tile(
            record, fields, election, rule, columns, row_factors, start, offsets, numel,
            DTYPES, OUT_DTYPE, KINDS, KEY_KIND, ALIGNMENT, WIDE, BLOCK,
        )  # fmt: skip
    if count > 0:
        tl.atomic_add(nonfinite_ptr + row, count.to(tl.int64))
