"""How a layer is cut for a launch: pure functions of sizes and dtypes, so that they are tested without a GPU.

A program works on one tile, ``block_numel`` elements of one tensor. Which one it is stands in a table with one entry
per run of ``tiles_per_entry`` tiles, so that a layer of thirty tensors is one launch, and a table for 200 M elements is
small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ITEMSIZES = (4, 2, 2, 8)
"""Bytes per element of F32, F16, BF16 and F64, by dtype code."""
F64 = 3

BYTES, NATURAL, VECTOR = 1, 2, 16
"""How operands lie: anywhere; at multiples of their itemsize; all of them at multiples of 16 bytes."""

MAX_OPERANDS = 9
"""Most operands of one Gram launch: 45 sums are what fits the registers. More are measured group by group."""

_TILES_PER_ENTRY = 64
_MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """Launch parameters of one kernel.

    Attributes:
        block_numel: elements of a tile, a power of two.
        num_threads: threads per program; Triton is told how many warps that are.
        chunk_numel: elements that are taken at a time; fewer than a tile's only in ``layer_gram_wide``.
        run_numel: adjacent elements that one thread has, where a kernel needs to know.
    """

    block_numel: int
    num_threads: int
    chunk_numel: int = 0
    run_numel: int = 1


@dataclass(frozen=True)
class Tiles:
    """The programs of one launch.

    Attributes:
        entries: (tensor, first tile) of every run of tiles; those of a tensor are adjacent and ascend.
        tiles_per_entry: programs per entry; those past the end of their tensor have nothing to do.
        first_programs: the first program of each tensor, and the number of programs.
    """

    entries: NDArray[np.int64]  # [E, 2]
    tiles_per_entry: int
    first_programs: NDArray[np.int64]  # [K + 1]

    @property
    def num_programs(self) -> int:
        """Return the size of the grid."""
        return int(self.first_programs[-1])


def cut(numels: Sequence[int], block_numel: int) -> Tiles:
    """Return the programs for tensors of these sizes; a tensor without elements has none.

    Raises:
        ValueError: more programs than a grid has.
    """
    counts = -(-np.asarray(numels, np.int64) // block_numel)
    # A run is as long as most tensors fill: thousands of short rows get an entry each, and no idle programs.
    mean = counts.sum() / max(1, np.count_nonzero(counts))
    per_entry = _TILES_PER_ENTRY if mean >= _TILES_PER_ENTRY / 4 else 1
    first_entries = np.concatenate([[0], np.cumsum(-(-counts // per_entry))])
    num_programs = int(first_entries[-1]) * per_entry
    if num_programs > _MAX_GRID:
        raise ValueError(f"got {num_programs} programs, expected at most {_MAX_GRID}")
    tensors = np.repeat(np.arange(counts.size), np.diff(first_entries))
    first_tiles = (np.arange(tensors.size) - first_entries[tensors]) * per_entry
    return Tiles(np.stack([tensors, first_tiles], axis=1), per_entry, first_entries * per_entry)


def alignment_of(addresses: Sequence[int], dtype_codes: Sequence[int]) -> int:
    """Return how the operands of one tensor lie: VECTOR, NATURAL or BYTES."""
    if all(address % VECTOR == 0 for address in addresses):
        return VECTOR
    pairs = zip(addresses, dtype_codes, strict=True)
    return NATURAL if all(address % ITEMSIZES[code] == 0 for address, code in pairs) else BYTES


def gram_launch(dtype_codes: Sequence[int]) -> Launch:
    """Return the parameters of ``layer_gram`` for operands of these dtypes, none of which is F64.

    16 elements of every operand per thread are about 100 registers with 4 operands; with more than 5 it is 8, so that
    nothing is spilled (the tests compile every case and look).
    """
    is_small = len(dtype_codes) <= 5
    run_numel = VECTOR // max(ITEMSIZES[code] for code in dtype_codes)
    if is_small:
        return Launch(4096, 256, 4096, run_numel)
    return Launch(1024, 128, 1024, run_numel)


def wide_gram_launch(dtype_codes: Sequence[int]) -> Launch:
    """Return the parameters of ``layer_gram_wide``; its tiles are those of ``layer_gram``, to redo some."""
    block_numel = 4096 if F64 in dtype_codes else gram_launch(dtype_codes).block_numel
    if len(dtype_codes) <= 5:
        return Launch(block_numel, 128, 512, 2)
    return Launch(block_numel, 256, 256, 1)


def merge_launch(dtype_codes: Sequence[int], out_dtype_code: int) -> Launch:
    """Return the parameters of ``layer_merge``: two vectors of 16 bytes per thread and operand, one if many."""
    narrowest = min(ITEMSIZES[code] for code in (*dtype_codes, out_dtype_code))
    per_thread = (2 if len(dtype_codes) <= 5 else 1) * VECTOR // narrowest
    if F64 in (*dtype_codes, out_dtype_code):
        per_thread = min(per_thread, 8)
    return Launch(128 * per_thread, 128)


def sparse_launch(dtype_codes: Sequence[int]) -> Launch:
    """Return the parameters of the kernels with masks, which work in fp64: 2 to 8 elements per thread, by models.

    Tiles are multiples of 4, so that the random numbers of one counter are never shared by two.
    """
    return Launch(128 * (8 if len(dtype_codes) <= 4 else 4 if len(dtype_codes) <= 6 else 2), 128)


def num_pairs(num_operands: int) -> int:
    """Return the number of entries on and above the diagonal of a Gram matrix."""
    return num_operands * (num_operands + 1) // 2


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least ``count``, at least 1."""
    return 1 << max(0, math.ceil(math.log2(count))) if count > 1 else 1


def operand_groups(num_operands: int, has_base: bool) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Return launches that cover a Gram matrix of any size: the operands of each, and the entries it is asked for.

    The base is in every launch, because task vectors are differences from it. Every entry (i, j), i ≤ j, is asked for
    once. Up to ``MAX_OPERANDS`` operands are one launch.
    """
    everything = tuple(range(num_operands))
    if num_operands <= MAX_OPERANDS:
        return [(everything, tuple((i, j) for i in everything for j in everything if i <= j))]
    head = (0,) if has_base else ()
    models = everything[len(head) :]
    size = (MAX_OPERANDS - len(head)) // 2
    blocks = [models[first : first + size] for first in range(0, len(models), size)]
    launches = []
    asked: set[tuple[int, int]] = set()
    for a, rows in enumerate(blocks):
        for columns in blocks[a + 1 :]:
            operands = (*head, *rows, *columns)
            wanted = [(i, j) for i in operands for j in operands if i <= j and (i, j) not in asked]
            asked.update(wanted)
            launches.append((operands, tuple(wanted)))
    return launches
