"""Builders of the tensors that kernels are tested with: awkward addresses, guard bytes, special values.

Conversions here are the tests' own, so that they can contradict metagpt_fast.reference.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metagpt_fast.dtypes import BF16, F16, F32, F64, DType

Raw = NDArray[np.uint8]
FloatArray = NDArray[np.float64]

FLOATS = (F32, F16, BF16, F64)
GUARD_NBYTES = 128
POISON = 0xA5
PAGE_NBYTES = mmap.PAGESIZE
IN_MEMORY = -1  # what the kernels take for a file descriptor where there is no file

# Sizes around a vector, two vectors, a block of 4096 and the pieces that threads take, and some primes.
SMALL_SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 255, 511, 512, 513)
BLOCK_SIZES = (4095, 4096, 4097, 8191)
LARGE_SIZES = (262143, 262144, 262145, 600011)

# The bits of 0, the smallest and largest subnormal, the smallest normal, 1 and neighbours, the largest
# finite number; Inf, a quiet NaN, a signalling NaN. special_bits adds the same with the sign bit.
_SPECIAL_BITS = {
    F32: (0, 1, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x7F7FFFFF),
    F16: (0, 1, 0x03FF, 0x0400, 0x3BFF, 0x3C00, 0x3C01, 0x7BFF),
    BF16: (0, 1, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x7F7F),
    F64: (
        0,
        1,
        2**52 - 1,
        2**52,
        0x3FEFFFFFFFFFFFFF,
        0x3FF0000000000000,
        0x3FF0000000000001,
        0x7FEFFFFFFFFFFFFF,
    ),
}
_NONFINITE_BITS = {
    F32: (0x7F800000, 0x7FC00000, 0x7F800001),
    F16: (0x7C00, 0x7E00, 0x7C01),
    BF16: (0x7F80, 0x7FC0, 0x7F81),
    F64: (0x7FF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001),
}
_MAGNITUDE_OF_INF = {dtype: bits[0] for dtype, bits in _NONFINITE_BITS.items()}


@dataclass
class Buffer:
    """The bytes of one tensor, this far from a 64-byte boundary, poisoned, between poisoned guards."""

    dtype: DType
    numel: int
    misalignment: int = 0
    memory: Raw = field(init=False, repr=False)
    start: int = field(init=False, repr=False)
    descriptor: int = field(init=False, repr=False, default=IN_MEMORY)

    def __post_init__(self) -> None:
        self.memory = np.full(self.nbytes + 2 * GUARD_NBYTES + 64 + self.misalignment, POISON, dtype=np.uint8)
        first = self.memory.ctypes.data + GUARD_NBYTES
        self.start = GUARD_NBYTES + (-first % 64) + self.misalignment

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def raw(self) -> Raw:
        return self.memory[self.start : self.start + self.nbytes]

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data) + self.start

    @property
    def operand(self) -> tuple[Raw, DType]:
        return self.raw, self.dtype

    def poison(self) -> None:
        """Overwrite the tensor, so that a test sees whether every byte is written."""
        self.raw[:] = POISON

    def guards_intact(self) -> bool:
        end = self.start + self.nbytes
        return bool(np.all(self.memory[: self.start] == POISON) and np.all(self.memory[end:] == POISON))


def buffer_of(raw: Raw, dtype: DType, misalignment: int = 0) -> Buffer:
    """Return a buffer that holds a copy of ``raw``."""
    buffer = Buffer(dtype, raw.size // dtype.itemsize, misalignment)
    buffer.raw[:] = raw
    return buffer


@dataclass
class EdgeBuffer:
    """The bytes of one tensor that touch a page which must not be read: right after them, or right before."""

    dtype: DType
    numel: int
    at_end: bool = True
    raw: Raw = field(init=False, repr=False)
    slack: Raw = field(init=False, repr=False)  # the accessible bytes beside the tensor
    descriptor: int = field(init=False, repr=False, default=IN_MEMORY)

    def __post_init__(self) -> None:
        nbytes = self.numel * self.dtype.itemsize
        body_nbytes = -(-max(nbytes, 1) // PAGE_NBYTES) * PAGE_NBYTES
        memory = np.frombuffer(mmap.mmap(-1, body_nbytes + 2 * PAGE_NBYTES), dtype=np.uint8)
        memory[:] = POISON
        _forbid_access(memory.ctypes.data)
        _forbid_access(memory.ctypes.data + PAGE_NBYTES + body_nbytes)
        start = PAGE_NBYTES + (body_nbytes - nbytes if self.at_end else 0)
        self.raw = memory[start : start + nbytes]
        self.slack = memory[PAGE_NBYTES:start] if self.at_end else memory[start + nbytes : -PAGE_NBYTES]

    @property
    def address(self) -> int:
        return int(self.raw.ctypes.data)

    @property
    def operand(self) -> tuple[Raw, DType]:
        return self.raw, self.dtype

    def poison(self) -> None:
        self.raw[:] = POISON

    def guards_intact(self) -> bool:
        return bool(np.all(self.slack == POISON))


def _forbid_access(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    protection_none = 0
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_NBYTES), protection_none) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def encode(values: FloatArray, dtype: DType) -> Raw:
    """Return ``values`` in ``dtype``; the half formats through float32, near enough for test data."""
    with np.errstate(all="ignore"):
        if dtype is F64:
            return np.ascontiguousarray(values, dtype=np.float64).view(np.uint8)
        singles = np.ascontiguousarray(values, dtype=np.float32)
        if dtype is BF16:
            return bf16_bits(singles).view(np.uint8)
        return singles.astype(dtype.numpy_name).view(np.uint8)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16: add half a unit (a bit less if the last kept bit is 0), cut."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def decode(raw: Raw, dtype: DType) -> FloatArray:
    """Return the values of ``raw``, with bfloat16 decoded from its fields."""
    if dtype is not BF16:
        with np.errstate(all="ignore"):
            return raw.view(dtype.numpy_name).astype(np.float64)
    bits = raw.view(np.uint16).astype(np.int64)
    sign, exponent, fraction = bits >> 15, bits >> 7 & 0xFF, bits & 0x7F
    magnitude = np.where(
        exponent == 0, np.ldexp(fraction, -133), np.ldexp(fraction + 128, np.maximum(exponent, 1) - 134)
    )
    magnitude = np.where(exponent == 255, np.where(fraction == 0, np.inf, np.nan), magnitude)
    return np.where(sign == 1, -magnitude, magnitude)


def bits_of(raw: Raw, dtype: DType) -> NDArray[np.uint64]:
    """Return the bit pattern of each element."""
    return raw.view(f"u{dtype.itemsize}").astype(np.uint64)


def nonfinite(raw: Raw, dtype: DType) -> NDArray[np.bool_]:
    """Return where elements are NaN or Inf, by their bits."""
    return (bits_of(raw, dtype) & np.uint64(2 ** (dtype.bits - 1) - 1)) >= np.uint64(_MAGNITUDE_OF_INF[dtype])


def differing(actual: Raw, expected: Raw, dtype: DType) -> NDArray[np.intp]:
    """Return the indices of elements whose bits differ; any NaN equals any other."""
    magnitude_mask, inf = np.uint64(2 ** (dtype.bits - 1) - 1), np.uint64(_MAGNITUDE_OF_INF[dtype])
    bits, expected_bits = bits_of(actual, dtype), bits_of(expected, dtype)
    both_nan = ((bits & magnitude_mask) > inf) & ((expected_bits & magnitude_mask) > inf)
    return np.flatnonzero((bits != expected_bits) & ~both_nan)


def special_bits(dtype: DType, *, finite: bool = False) -> Raw:
    """Return the bytes of every special value of ``dtype``, both signs."""
    magnitudes = _SPECIAL_BITS[dtype] + (() if finite else _NONFINITE_BITS[dtype])
    sign = 1 << (dtype.bits - 1)
    return np.array([*magnitudes, *(sign | bits for bits in magnitudes)], dtype=f"u{dtype.itemsize}").view(np.uint8)


def random_special(rng: np.random.Generator, dtype: DType, numel: int, *, finite: bool = False) -> Raw:
    """Return ``numel`` special values in random order."""
    table = special_bits(dtype, finite=finite).view(f"u{dtype.itemsize}")
    return rng.choice(table, numel).view(np.uint8)


def random_bits(rng: np.random.Generator, dtype: DType, numel: int) -> Raw:
    """Return ``numel`` random bit patterns: every exponent equally often, NaN and Inf among them."""
    return rng.integers(0, 256, numel * dtype.itemsize, dtype=np.uint8)


def weights(rng: np.random.Generator, dtypes: Sequence[DType], numel: int, *, has_base: bool = True) -> list[Raw]:
    """Return operands like a language model's: weights of 0.02, changed by a tenth of that in fine-tuning."""
    base = rng.normal(0.0, 0.02, numel)
    values = [base + (rng.normal(0.0, 0.002, numel) if i or not has_base else 0.0) for i in range(len(dtypes))]
    return [encode(v, dtype) for v, dtype in zip(values, dtypes, strict=True)]


def special_values(
    rng: np.random.Generator, dtypes: Sequence[DType], numel: int, *, has_base: bool = True
) -> list[Raw]:
    """Return operands of special values."""
    return [random_special(rng, dtype, numel) for dtype in dtypes]


def bit_patterns(rng: np.random.Generator, dtypes: Sequence[DType], numel: int, *, has_base: bool = True) -> list[Raw]:
    """Return operands of random bit patterns."""
    return [random_bits(rng, dtype, numel) for dtype in dtypes]


def halfway(rng: np.random.Generator, dtypes: Sequence[DType], numel: int, *, has_base: bool = True) -> list[Raw]:
    """Return numbers of few bits and similar size, whose sums often lie halfway between two half values."""
    values = rng.integers(-600, 600, (len(dtypes), numel)) * 2.0 ** rng.integers(-10, -2, (len(dtypes), numel))
    return [encode(v, dtype) for v, dtype in zip(values, dtypes, strict=True)]


def make_layer(
    rng: np.random.Generator,
    dtypes: Sequence[DType],
    sizes: Sequence[int],
    *,
    raws: Callable[..., list[Raw]] = weights,
    has_base: bool = True,
    misalignments: Sequence[int] = (0,),
) -> list[list[Buffer]]:
    """Return a layer of tensors of these sizes, whose operands start at the misalignments in turn."""
    shifts = itertools.cycle(misalignments)
    return [
        [
            buffer_of(raw, dtype, next(shifts))
            for raw, dtype in zip(raws(rng, dtypes, numel, has_base=has_base), dtypes, strict=True)
        ]
        for numel in sizes
    ]


def make_out(
    layer: Sequence[Sequence[Buffer]], dtypes: Sequence[DType], misalignments: Sequence[int] = (0,)
) -> list[Buffer]:
    """Return poisoned outputs for the layer; dtypes and misalignments in turn."""
    turns = zip(layer, itertools.cycle(dtypes), itertools.cycle(misalignments), strict=False)
    return [Buffer(dtype, tensor[0].numel, shift) for tensor, dtype, shift in turns]


def dtype_names(dtypes: object) -> str:
    """Return a test id for a tuple of dtypes."""
    return "-".join(map(str, dtypes)) if isinstance(dtypes, tuple) else str(dtypes)
