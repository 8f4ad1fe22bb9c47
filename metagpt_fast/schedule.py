"""In which order the bytes are read: rounds of scopes, cut into batches that fit the memory window."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ._native import SPAN_NUMEL
from .checkpoint import TensorSource
from .input_files import FileRange
from .plan import LayerPlan, TensorPlan


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``[first, first + numel)`` of one tensor.

    ``row`` is its row in the Gram matrices.
    """

    row: int
    tensor: TensorPlan
    first: int
    numel: int

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """Return what is read of it: the models, after the base if there is one."""
        return self.tensor.sources

    def ranges(self) -> Iterator[FileRange]:
        """Yield the parts of the input files that hold these elements."""
        for source in self.sources:
            itemsize = source.dtype.itemsize
            yield source.path, source.data_offset + self.first * itemsize, self.numel * itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of the piece in all its sources."""
        return self.numel * sum(source.dtype.itemsize for source in self.sources)


@dataclass(frozen=True)
class Batch:
    """Pieces that are in memory together.

    ``is_mapped`` is False for a whole tensor that is larger than the window: it is read through bounded buffers.
    """

    pieces: tuple[Piece, ...]
    is_mapped: bool = True

    @cached_property
    def nbytes(self) -> int:
        """Return the bytes of all pieces in all their sources."""
        return sum(piece.nbytes for piece in self.pieces)

    @cached_property
    def ranges(self) -> list[FileRange]:
        """Return the parts of the input files that the batch reads, neighbours joined, by file and offset."""
        parts = [part for piece in self.pieces for part in piece.ranges()]
        parts.sort(key=lambda part: (str(part[0]), part[1]))
        joined: list[FileRange] = []
        for path, offset, nbytes in parts:
            if joined and joined[-1][1] + joined[-1][2] == offset and joined[-1][0] == path:
                joined[-1] = (path, joined[-1][1], joined[-1][2] + nbytes)
            else:
                joined.append((path, offset, nbytes))
        return joined

    def without(self, rows: Container[int]) -> Batch | None:
        """Return the batch without the pieces of these rows; None if nothing is left."""
        pieces = tuple(piece for piece in self.pieces if piece.row not in rows)
        if len(pieces) == len(self.pieces):
            return self
        return Batch(pieces, self.is_mapped) if pieces else None


@dataclass(frozen=True)
class Step:
    """One action: measure or combine a batch, or solve scopes once all their batches are measured."""

    action: Literal["measure", "solve", "combine"]
    batch: Batch | None = None
    scopes: tuple[int, ...] = ()


def make_schedule(
    scopes: Sequence[LayerPlan], *, window_nbytes: int, measure: bool, combine: bool, is_cuttable: bool = True
) -> list[Step]:
    """Return the steps of a merge.

    A round is a run of scopes that fit the window together, or one larger scope. Its batches are measured in order,
    then its scopes are solved, then its batches are combined in reverse order, so that what is still in memory, or
    in the page cache, comes first. With one scope (granularity ``model``) this is two passes over the files, with
    many small ones it is one pass.

    Args:
        scopes: what coefficients are solved for; together all merged tensors, in the order of the Gram matrices.
        window_nbytes: bytes of base and models that may be mapped at a time.
        measure: whether Gram matrices are needed; without, batches are combined in order.
        combine: whether an output is written.
        is_cuttable: whether a tensor larger than the window may be worked through in pieces.
    """
    steps: list[Step] = []
    for first_scope, first_row, members in _rounds(scopes, window_nbytes):
        tensors = [tensor for scope in members for tensor in scope.tensors]
        cut = _batches if is_cuttable else _whole_batches
        batches = list(cut(tensors, first_row, window_nbytes))
        if measure:
            steps += [Step("measure", batch) for batch in batches]
            batches.reverse()
        if combine:
            steps.append(Step("solve", scopes=tuple(range(first_scope, first_scope + len(members)))))
            steps += [Step("combine", batch) for batch in batches]
    return steps


def _rounds(scopes: Sequence[LayerPlan], window_nbytes: int) -> Iterator[tuple[int, int, list[LayerPlan]]]:
    """Yield the first scope's number, the first tensor's row, and the scopes of each round."""
    members: list[LayerPlan] = []
    first_scope = first_row = next_row = nbytes = 0
    for number, scope in enumerate(scopes):
        scope_nbytes = sum(tensor.nbytes_read for tensor in scope.tensors)
        if members and nbytes + scope_nbytes > window_nbytes:
            yield first_scope, first_row, members
            members, first_scope, first_row, nbytes = [], number, next_row, 0
        members.append(scope)
        nbytes += scope_nbytes
        next_row += len(scope.tensors)
    if members:
        yield first_scope, first_row, members


def _batches(tensors: Sequence[TensorPlan], first_row: int, window_nbytes: int) -> Iterator[Batch]:
    """Yield batches of at most the window; a tensor is cut at multiples of SPAN_NUMEL, which keeps the sums' bits."""
    pieces: list[Piece] = []
    free = window_nbytes
    for row, tensor in enumerate(tensors, start=first_row):
        element_nbytes = sum(source.dtype.itemsize for source in tensor.sources)
        first, numel = 0, tensor.numel
        while first < numel:
            fitting = numel - first
            if fitting * element_nbytes > free:
                fitting = free // element_nbytes // SPAN_NUMEL * SPAN_NUMEL
                if fitting <= 0 and pieces:  # below 0 behind a single span that is larger than the window
                    yield Batch(tuple(pieces))
                    pieces, free = [], window_nbytes
                    continue
                fitting = min(max(fitting, SPAN_NUMEL), numel - first)
            pieces.append(Piece(row, tensor, first, fitting))
            free -= fitting * element_nbytes
            first += fitting
    if pieces:
        yield Batch(tuple(pieces))


def _whole_batches(tensors: Sequence[TensorPlan], first_row: int, window_nbytes: int) -> Iterator[Batch]:
    """Yield batches of whole tensors: at most the window, or one tensor that is larger, and not mapped."""
    pieces: list[Piece] = []
    free = window_nbytes
    for row, tensor in enumerate(tensors, start=first_row):
        if pieces and tensor.nbytes_read > free:
            yield Batch(tuple(pieces))
            pieces, free = [], window_nbytes
        if tensor.nbytes_read > window_nbytes:
            yield Batch((Piece(row, tensor, 0, tensor.numel),), is_mapped=False)
            continue
        pieces.append(Piece(row, tensor, 0, tensor.numel))
        free -= tensor.nbytes_read
    if pieces:
        yield Batch(tuple(pieces))
