"""Layers cut into slices that fit a slot: what is read into it, where it lies, and what is written from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .. import _native
from ..errors import BackendError
from ..quantities import format_nbytes
from .launch_tables import BLOCK_NUMEL, SPAN_NUMEL, table_nbytes
from .tables import ITEMSIZES, MEMORY, LayerTable, OutputTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What the kernels' 16-byte loads ask for; also where two neighbours in a file stay neighbours in a slot.
_ALIGNMENT = 16
_TABLE_ALIGNMENT = 256

NUM_SLOTS = 4
"""Slots of each kind: one is read into, one copied, one computed with, and one is ahead."""
NUM_PARTS = 2 * NUM_SLOTS + 1
"""What device memory is divided into: slots for input, slots for output, scratch memory."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes between a slot and memory or a file.

    Attributes:
        offset: in the slot.
        address: in memory, or in the file.
        file: descriptor, or MEMORY.
        nbytes: how many.
        tensor: the tensor of the first byte, by its number in the layer.
        operand: and its operand; -1 for an output.
    """

    offset: int
    address: int
    file: int
    nbytes: int
    tensor: int
    operand: int


@dataclass(frozen=True)
class Slice:
    """Pieces of tensors that are on the device together.

    Attributes:
        tensors: int64 ``[P]``: of which tensors of the layer.
        firsts, numels: int64 ``[P]``: elements ``[first, first + numel)`` of each.
        offsets: int64 ``[P, V]``: where the operands begin in the slot, behind the table.
        bits_offsets: int64 ``[P]``: where the masks that are read begin, one behind the other.
        out_offsets: int64 ``[P]``: where the results begin in the slot of the output, or masks that are written.
        nbytes: of table, operands and masks.
        out_nbytes: of the results.
    """

    tensors: NDArray[np.int64]
    firsts: NDArray[np.int64]
    numels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bits_offsets: NDArray[np.int64]
    out_offsets: NDArray[np.int64]
    nbytes: int
    out_nbytes: int


@dataclass(frozen=True)
class Limits:
    """How large a slice may be.

    Attributes:
        nbytes: of input, as of output: what a slot holds.
        preferred_nbytes: of input; a single span may be larger.
        num_blocks: blocks, for which there is scratch memory.
    """

    nbytes: int
    preferred_nbytes: int
    num_blocks: int


@dataclass(frozen=True)
class Extras:
    """What pieces of a layer take besides their operands and results.

    Attributes:
        units: int64 ``[K]``: pieces begin at multiples of so many elements.
        bits_in, bits_out: int64 ``[K]``: masks that are read, and written, with a bit per element.
        table_nbytes: most bytes per piece behind its part of the layer's table.
    """

    units: NDArray[np.int64]
    bits_in: NDArray[np.int64]
    bits_out: NDArray[np.int64]
    table_nbytes: int = 0

    @classmethod
    def none(cls, num_tensors: int, table_nbytes: int = 0) -> Extras:
        """Return those of tensors without masks that are cut at multiples of SPAN_NUMEL, which keeps sums' bits."""
        zeros = np.zeros(num_tensors, np.int64)
        return cls(np.full(num_tensors, SPAN_NUMEL, np.int64), zeros, zeros, table_nbytes)


def bits_nbytes(numels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the room that a mask of so many elements takes in a slot."""
    return _round_up(-(-numels // 8), _ALIGNMENT)


def cut_into_slices(
    layer: LayerTable, out: OutputTable | None, limits: Limits, extras: Extras | None = None
) -> Iterator[Slice]:
    """Yield the layer's slices, in order. Tensors are cut at multiples of SPAN_NUMEL, or of the extras' units.

    Raises:
        BackendError: a single span of a tensor, or unit, does not fit.
    """
    more = Extras.none(layer.num_tensors) if extras is None else extras
    itemsizes = ITEMSIZES[layer.dtypes].astype(np.int64)
    out_itemsizes = np.zeros(layer.num_tensors, np.int64) if out is None else ITEMSIZES[out.dtypes].astype(np.int64)
    pieces: list[tuple[int, int, int]] = []
    used = used_out = blocks = 0
    for k in range(layer.num_tensors):
        numel, unit = int(layer.numels[k]), int(more.units[k])
        bits_in, bits_out = int(more.bits_in[k]), int(more.bits_out[k])
        # Upper bounds: an operand, or a mask, may need up to an alignment more than its bytes.
        fixed = table_nbytes(1, layer.num_operands, layer.has_base) + more.table_nbytes
        fixed += _ALIGNMENT * (layer.num_operands + bits_in)
        out_fixed = _ALIGNMENT * max(bits_out, 1)
        per_element = 8 * int(itemsizes[k].sum()) + bits_in  # in bits, as the next
        per_result = 8 * int(out_itemsizes[k]) + bits_out
        first = 0
        while first < numel:
            room = min(
                8 * (limits.nbytes - _TABLE_ALIGNMENT - used - fixed) // per_element,
                8 * (limits.nbytes - used_out - out_fixed) // per_result if per_result else numel,
                (limits.num_blocks - blocks) * BLOCK_NUMEL,
            )
            wanted = 8 * (limits.preferred_nbytes - used - fixed) // per_element
            if wanted < unit and not pieces:
                wanted = unit
            fitting = numel - first
            if fitting > min(room, wanted):
                fitting = max(min(room, wanted), 0) // unit * unit
            if fitting == 0:
                if not pieces:
                    least = min(numel - first, unit)
                    needed = -(-least * max(per_element, per_result) // 8) + fixed + out_fixed + _TABLE_ALIGNMENT
                    scratch = -(-least // BLOCK_NUMEL) * (limits.nbytes // max(limits.num_blocks, 1))
                    raise _too_small(limits, max(needed, scratch))
                yield _lay_out(layer, itemsizes, out_itemsizes, more, pieces)
                pieces, used, used_out, blocks = [], 0, 0, 0
                continue
            pieces.append((k, first, fitting))
            used += fixed + -(-fitting * per_element // 8)
            used_out += out_fixed + -(-fitting * per_result // 8)
            blocks += -(-fitting // BLOCK_NUMEL)
            first += fitting
    if pieces:
        yield _lay_out(layer, itemsizes, out_itemsizes, more, pieces)


def reads_of(part: Slice, layer: LayerTable) -> list[Transfer]:
    """Return what is read into the slot; neighbours in memory, or in a file, in one go."""
    transfers = []
    for operand in range(layer.num_operands):
        files, dtypes = layer.files[part.tensors, operand], layer.dtypes[part.tensors, operand]
        itemsizes = ITEMSIZES[dtypes].astype(np.int64)
        addresses = layer.addresses[part.tensors, operand] + (part.firsts * itemsizes).astype(np.uint64)
        transfers += _joined(part, part.offsets[:, operand], addresses, files, part.numels * itemsizes, operand)
    return transfers


def writes_of(part: Slice, out: OutputTable) -> list[Transfer]:
    """Return what is written from the output's slot."""
    itemsizes = ITEMSIZES[out.dtypes[part.tensors]].astype(np.int64)
    addresses = out.addresses[part.tensors] + (part.firsts * itemsizes).astype(np.uint64)
    return _joined(part, part.out_offsets, addresses, out.files[part.tensors], part.numels * itemsizes, -1)


class SliceChecksums:
    """The CRC32C of what slices write to files, added up by tensor. Threads may add slices, in any order."""

    def __init__(self, out: OutputTable) -> None:
        self._out = out
        self._slices: list[tuple[Slice, NDArray[np.uint32]]] = []

    def add(self, part: Slice, address: int) -> None:
        """Take the results of a slice from the memory at ``address``."""
        crcs = np.zeros(len(part.tensors), np.uint32)
        in_file = self._out.files[part.tensors] != MEMORY
        if in_file.any():
            addresses = (address + part.out_offsets[in_file]).astype(np.uint64)
            crcs[in_file] = _native.crc32c_of_memory(addresses, self._nbytes(part)[in_file])
        self._slices.append((part, crcs))

    def joined(self) -> NDArray[np.uint32]:
        """Return the CRC32C of every tensor, uint32 ``[K]``, when all slices are there; 0 for results in memory."""
        num_tensors = len(self._out.files)
        if not self._slices:
            return np.zeros(num_tensors, np.uint32)
        tensors = np.concatenate([part.tensors for part, _ in self._slices])
        firsts = np.concatenate([part.firsts for part, _ in self._slices])
        nbytes = np.concatenate([self._nbytes(part) for part, _ in self._slices])
        crcs = np.concatenate([each for _, each in self._slices])
        order = np.lexsort((firsts, tensors))
        return _native.crc32c_join(crcs[order], nbytes[order], tensors[order], num_tensors)

    def _nbytes(self, part: Slice) -> NDArray[np.int64]:
        return part.numels * ITEMSIZES[self._out.dtypes[part.tensors]].astype(np.int64)


def _joined(
    part: Slice,
    offsets: NDArray[np.int64],
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    nbytes: NDArray[np.int64],
    operand: int,
) -> list[Transfer]:
    joined: list[Transfer] = []
    columns = (offsets.tolist(), addresses.tolist(), files.tolist(), nbytes.tolist(), part.tensors.tolist())
    for offset, address, file, size, tensor in zip(*columns, strict=True):
        if joined:
            last = joined[-1]
            ends = last.offset + last.nbytes, last.address + last.nbytes, last.file
            if ends == (offset, address, file):
                joined[-1] = Transfer(last.offset, last.address, file, last.nbytes + size, last.tensor, operand)
                continue
        joined.append(Transfer(offset, address, file, size, tensor, operand))
    return joined


def _lay_out(
    layer: LayerTable,
    itemsizes: NDArray[np.int64],
    out_itemsizes: NDArray[np.int64],
    extras: Extras,
    pieces: list[tuple[int, int, int]],
) -> Slice:
    """Place the table first, then operand after operand, so that what is adjacent in files is adjacent here."""
    tensors, firsts, numels = (np.array(column, np.int64) for column in zip(*pieces, strict=True))
    table = table_nbytes(len(pieces), layer.num_operands, layer.has_base) + len(pieces) * extras.table_nbytes
    start = _round_up(table, _TABLE_ALIGNMENT)
    sizes = _round_up(numels[:, None] * itemsizes[tensors], _ALIGNMENT)  # [P, V]
    ends = np.cumsum(sizes.T.reshape(-1))
    offsets = start + (ends - sizes.T.reshape(-1)).reshape(sizes.T.shape).T
    bits = bits_nbytes(numels)
    bits_ends = start + ends[-1] + np.cumsum(bits * extras.bits_in[tensors])
    out_sizes = _round_up(numels * out_itemsizes[tensors], _ALIGNMENT) + bits * extras.bits_out[tensors]
    out_ends = np.cumsum(out_sizes)
    return Slice(
        tensors,
        firsts,
        numels,
        offsets,
        bits_ends - bits * extras.bits_in[tensors],
        out_ends - out_sizes,
        int(bits_ends[-1]),
        int(out_ends[-1]),
    )


_Sizes = TypeVar("_Sizes", int, "NDArray[np.int64]")


def _round_up(sizes: _Sizes, multiple: int) -> _Sizes:
    return -(-sizes // multiple) * multiple


def _too_small(limits: Limits, needed: int) -> BackendError:
    return BackendError(
        "too little device memory for one piece of a tensor in all models",
        where="device_memory",
        got=f"slots of {format_nbytes(limits.nbytes)}",
        expected=f"slots of {format_nbytes(needed)}",
        hint=f"give --device-memory {-(-needed * NUM_PARTS // 2**20)}MiB",
    )
