"""Masks of sparse methods: what is kept of each task vector. Functions for kernels; the rules are in docs/numerics.md.

The table has one row of int64 per tensor and model: upper key, lower key, upper index, lower index, probability,
address of a mask made before (RANKED), random stream, bits of the value.
"""

import triton
import triton.language as tl

from .elements import load_values

ALL = tl.constexpr(0)
BAND = tl.constexpr(1)
RANDOM = tl.constexpr(2)
RANKED = tl.constexpr(3)
NEAR = tl.constexpr(4)
MAGNITUDE = tl.constexpr(0)
VARIANCE = tl.constexpr(1)
IMPORTANCE = tl.constexpr(2)
FIELDS = tl.constexpr(8)
_NAN_KEY = tl.constexpr(0x7FC00000)
_LARGEST_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _load_deltas(
    record,
    start,
    offsets,
    numel,
    DTYPES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    base = load_values(tl.load(record + 2), start, offsets, numel, DTYPES[0], ALIGNMENT, MASKED, WIDE)
    deltas = (load_values(tl.load(record + 3), start, offsets, numel, DTYPES[1], ALIGNMENT, MASKED, WIDE) - base,)
    for t in tl.static_range(2, len(DTYPES)):
        x = load_values(tl.load(record + 2 + t), start, offsets, numel, DTYPES[t], ALIGNMENT, MASKED, WIDE)
        deltas = deltas + (x - base,)
    return base, deltas


@triton.jit
def load_deltas(
    record,
    start,
    offsets,
    numel,
    DTYPES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the base and the tuple of model − base for a tile, fp32, or fp64 where WIDE; zeros past the end."""
    if start + BLOCK <= numel:
        base, deltas = _load_deltas(record, start, offsets, numel, DTYPES, ALIGNMENT, False, WIDE)
    else:
        base, deltas = _load_deltas(record, start, offsets, numel, DTYPES, ALIGNMENT, True, WIDE)
    return base, deltas


@triton.jit
def _key_of(x):
    """Return the bits of |x| in fp32, a NaN above all numbers: int32."""
    single = tl.abs(x.to(tl.float32))
    return tl.where(single == single, single.to(tl.int32, bitcast=True), _NAN_KEY)


@triton.jit
def keys_of(deltas, model: tl.constexpr, start, offsets, numel, columns, row_factors, KEY_KIND: tl.constexpr):
    """Return what the elements of a tile are ranked by: int32, not negative.

    Args:
        deltas: tuple of T task vectors [BLOCK].
        model: which of them; VARIANCE looks at all.
        start: int64, the tile's first element.
        offsets: int32 [BLOCK].
        numel: int64, elements of the tensor.
        columns: int64, elements per row.
        row_factors: int64, address of fp64 [numel / columns], for IMPORTANCE.
        KEY_KIND: MAGNITUDE, VARIANCE or IMPORTANCE.
    """
    if KEY_KIND == VARIANCE:
        # T² times the variance, from differences to the first model: exactly 0 where models agree.
        first = deltas[0].to(tl.float64)
        total = tl.zeros(first.shape, tl.float64)
        squares = tl.zeros(first.shape, tl.float64)
        for t in tl.static_range(1, len(deltas)):
            difference = deltas[t].to(tl.float64) - first
            total = total + difference
            squares = squares + difference * difference
        key = _key_of(squares * len(deltas) - total * total)
    elif KEY_KIND == IMPORTANCE:
        row = (start + offsets) // columns
        exists = offsets < numel - start
        factor = tl.load(row_factors.to(tl.pointer_type(tl.float64)) + row, mask=exists, other=0.0)
        key = _key_of(deltas[model].to(tl.float64) * factor)
    else:
        key = _key_of(deltas[model])
    return key


@triton.jit
def random_numbers(stream, start, BLOCK: tl.constexpr):
    """Return the 32-bit random numbers of elements start ... start + BLOCK − 1 as int64: Philox4x32-10.

    Element e has word e mod 4 of counter e div 4 under the stream's key (Salmon et al., SC 2011). ``start`` is a
    multiple of 4.
    """
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(stream.to(tl.uint64, bitcast=True), low, high, zero, zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return words.to(tl.int64)


@triton.jit
def number_of(stream, element):
    """Return the random number of each of these elements, int64; every one costs a whole counter."""
    counter = element // 4
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(stream.to(tl.uint64, bitcast=True), low, high, zero, zero)
    word = element % 4
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)).to(tl.int64)


@triton.jit
def mask_of(
    deltas,
    model: tl.constexpr,
    fields,
    start,
    offsets,
    numel,
    columns,
    row_factors,
    KIND: tl.constexpr,
    KEY_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return which elements of a tile a model keeps, and with what weight: bool [BLOCK], fp64 [BLOCK].

    Elements past the end of the tensor are not kept.
    """
    exists = offsets < numel - start
    kept = exists
    weight = tl.full([BLOCK], 1.0, tl.float64)
    if KIND == BAND:
        key = keys_of(deltas, model, start, offsets, numel, columns, row_factors, KEY_KIND)
        upper = tl.minimum(tl.load(fields), _LARGEST_KEY).to(tl.int32)
        lower = tl.minimum(tl.load(fields + 1), _LARGEST_KEY).to(tl.int32)
        index = start + offsets
        is_below = (key < upper) | ((key == upper) & (index >= tl.load(fields + 2)))
        is_above = (key > lower) | ((key == lower) & (index <= tl.load(fields + 3)))
        kept = exists & is_below & is_above
    elif KIND == RANDOM:
        kept = exists & (random_numbers(tl.load(fields + 6), start, BLOCK) < tl.load(fields + 4))
    elif KIND == RANKED:
        made = tl.load(fields + 5).to(tl.pointer_type(tl.uint8)) + start + offsets
        kept = tl.load(made, mask=exists, other=0) != 0
    elif KIND == NEAR:
        value = tl.load(fields + 7).to(tl.float64, bitcast=True)
        magnitude = tl.abs(deltas[model].to(tl.float64))
        ratio = value / tl.where(magnitude > 1e-6, magnitude, 1e-6)
        weight = tl.where(ratio > 0, ratio, 0.0)
        weight = tl.where(weight < 1, weight, 1.0)
        kept = exists & (weight > 0)
    return kept, weight
