"""The loop: prefetch the next batch → kernels → writer → release."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from . import trust
from ._native import FileOperandError, InputChangedError, place_of
from .backends.tables import LayerTable, layer_table, output_table
from .errors import CheckpointError, DataError, OutputError
from .measurement import norms_of
from .nonfinite import NonfiniteInputs
from .operations import make_operation
from .pass_journal import PassJournal
from .schedule import Batch, Piece, Step, make_schedule
from .untrusted import brief

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .backends.tables import Backend
    from .input_files import InputFiles
    from .plan import MergePlan, TensorPlan
    from .writer import CheckpointWriter

    FloatArray = NDArray[np.float64]


class Progress(Protocol):
    """What is told how far the work is; see :mod:`metagpt_fast.progress` for those of the command line."""

    def start(self, phase: str, total_nbytes: int) -> None:
        """A phase begins that works through ``total_nbytes`` bytes of input."""

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more bytes are done."""

    def finish(self) -> None:
        """The phase is over."""


class LayerPass:
    """Measures, solves and combines a plan's tensors in bounded memory.

    Args:
        plan: what to merge.
        files: the open input files.
        backend: what computes.
        window_nbytes: bytes of base and models that may be mapped at a time.
        gram: Gram matrices measured before, float64 ``[N, T+1, T+1]``; None if they are to be measured.
        allow_nonfinite: combine NaN and Inf of the inputs as they are, where nothing is measured.
        progress: what is told how far the work is.

    Attributes:
        gram: the Gram matrix of ``[θ₀, τ_1 ... τ_T]`` of every merged tensor, float64 ``[N, T+1, T+1]``; None if
            the method measures none, or combines models without a base.
        coefficients: of every merged tensor, float64 ``[N, T]``, NaN until solved.
        nbytes_read, nbytes_written: bytes of tensors read from files (once, where combining follows measuring at once)
            and written.
        seconds_measure, seconds_combine: wall time per kind of step.
    """

    def __init__(
        self,
        plan: MergePlan,
        files: InputFiles,
        backend: Backend,
        *,
        window_nbytes: int,
        gram: FloatArray | None = None,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._plan = plan
        self._files = files
        self._backend = backend
        self._window_nbytes = window_nbytes
        self._progress = progress
        self._operation = make_operation([tensor.row for tensor in plan.merged], backend, gram)
        self._journal = PassJournal(plan.merged, self._operation)
        self._is_measured = gram is not None
        self._nonfinite = NonfiniteInputs(plan.labels, backend, is_allowed=allow_nonfinite)
        self.nbytes_read = 0
        self.nbytes_written = 0
        self.seconds_measure = 0.0
        self.seconds_combine = 0.0
        # Layer by layer, combining finds the bytes in memory; over the whole model it reads the files (again).
        self._is_second_read = not self._operation.needs_measurement or plan.recipe.granularity == "model"
        self._scope_of_row = np.repeat(np.arange(len(plan.scopes)), [len(scope.tensors) for scope in plan.scopes])

    @property
    def num_unchanged(self) -> int:
        """Return how many tensors were copied because no model changed them."""
        return len(self._journal.unchanged)

    @property
    def num_nonfinite(self) -> dict[str, int]:
        """Return output tensor name → elements that overflowed to Inf in the output dtype."""
        return self._journal.num_nonfinite

    @property
    def nonfinite_owners(self) -> dict[str, set[str]]:
        """Return output tensor name → whose tensors hold NaN or Inf; ``num_nonfinite`` counts what came of them."""
        return self._nonfinite.owners

    @property
    def num_resumed(self) -> int:
        """Return how many tensors were there already, written by the run that this one resumes."""
        return self._journal.num_resumed

    @property
    def coefficients(self) -> FloatArray:
        """Return the coefficients of every merged tensor."""
        return self._operation.coefficients

    @property
    def gram(self) -> FloatArray | None:
        """Return the Gram matrices, if there are any of a base and task vectors."""
        has_base = all(tensor.base is not None for tensor in self._plan.merged)
        return self._operation.gram if self._is_measured and has_base else None

    @property
    def total_gram(self) -> FloatArray | None:
        """Return the Gram matrix over all merged tensors, float64 ``[1 + M, 1 + M]`` of the plan's M models."""
        gram = self.gram
        if gram is None:
            return None
        total = np.zeros((1 + len(self._plan.models),) * 2)
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, tensor in enumerate(self._plan.merged):
            rows_of.setdefault(tensor.columns, []).append(row)
        for columns, rows in rows_of.items():
            places = [0, *(1 + column for column in columns)]
            total[np.ix_(places, places)] += gram[rows, : len(places), : len(places)].sum(axis=0)
        return total

    def measure(self) -> None:
        """Fill in the Gram matrices: one pass over the files, nothing written."""
        self._run(
            make_schedule(
                self._plan.scopes,
                window_nbytes=self._window_nbytes,
                measure=True,
                combine=False,
                is_cuttable=self._operation.is_cuttable,
            ),
            None,
        )

    def merge(self, writer: CheckpointWriter) -> None:
        """Measure what is needed, solve, and write every merged tensor.

        Raises:
            DataError: a tensor holds NaN or Inf, or no model differs from the base.
        """
        steps = make_schedule(
            self._plan.scopes,
            window_nbytes=self._window_nbytes,
            measure=self._operation.needs_measurement,
            combine=True,
            is_cuttable=self._operation.is_cuttable,
        )
        self._run(self._journal.remaining(steps, self._scope_of_row, writer), writer)

    def resume(self, writer: CheckpointWriter) -> None:
        """Take over what the run that ``writer`` resumes has done; call it first."""
        self._journal.restore(writer)
        self._is_measured = self._is_measured or (self._operation.needs_measurement and bool(self._journal.measured))

    def copy(self, writer: CheckpointWriter) -> None:
        """Write the tensors that the plan takes from the base as they are."""
        for tensor in self._plan.copied:
            if not writer.is_written(tensor.name):
                self._copy(tensor, writer)
                writer.record({}, [tensor.name])

    def _run(self, steps: Sequence[Step], writer: CheckpointWriter | None) -> None:
        batches = [step.batch for step in steps]
        following = _following(batches)
        phase = _Phases(self._progress, steps)
        if batches and (first := next(filter(None, batches), None)):
            self._files.prefetch(first.ranges)
        for number, step in enumerate(steps):
            started = time.perf_counter()
            coming = following[number]
            if step.batch is None:
                self._solve(step.scopes)
                continue
            if coming is not None and coming is not step.batch:
                self._files.prefetch(coming.ranges)
            phase.begin(step)
            if step.action == "measure":
                self._measure(step.batch)
                if writer is not None:
                    self._journal.add_measured(step.batch.pieces, writer)
                self.seconds_measure += time.perf_counter() - started
            else:
                assert writer is not None  # a schedule with combining steps is run with a writer only
                self._combine(step.batch, writer)
                self._journal.add_written(step.batch.pieces, writer)
                self.seconds_combine += time.perf_counter() - started
            if coming is not step.batch:
                self._files.release(step.batch.ranges)
            phase.done(step)
        phase.finish()

    def _measure(self, batch: Batch) -> None:
        for pieces in _alike(batch.pieces):
            layer = self._table(pieces, batch.is_mapped)
            with self._input_errors(pieces):
                finite = self._operation.measure(layer, [piece.row for piece in pieces])
            if not finite.all():
                self._nonfinite.check(pieces, layer, is_measured=True)
                name = pieces[int(np.argmin(finite))].tensor.name
                raise DataError("the squared norm overflows float64", where=f"tensor {brief(name)}")
        self._is_measured = True
        self.nbytes_read += batch.nbytes

    def _solve(self, scopes: Sequence[int]) -> None:
        last = 0
        for scope in scopes:
            first, last = np.searchsorted(self._scope_of_row, [scope, scope + 1])
            self._operation.solve(range(first, last))
        if last == len(self._plan.merged) and (total := self.total_gram) is not None:
            self._check_total(total)

    def _check_total(self, total: FloatArray) -> None:
        """Raise DataError if the Gram matrix of the whole model says that there is nothing to merge."""
        trust.sum_of(total[None], self._plan.base.path)
        if self._plan.tool is None:  # other tools let the base be merged with itself
            trust.check_any_change(self._plan.labels, norms_of(total), self._plan.base.path)

    def _combine(self, batch: Batch, writer: CheckpointWriter) -> None:
        merged = []
        for piece in batch.pieces:
            if self._is_unchanged(piece):
                if piece.first == 0:
                    self._copy(piece.tensor, writer)
                    self._journal.unchanged.add(piece.tensor.name)
            else:
                merged.append(piece)
        for pieces in _alike(merged):
            self._combine_alike(pieces, batch.is_mapped, writer)
        if self._is_second_read:
            self.nbytes_read += sum(piece.nbytes for piece in merged)

    def _combine_alike(self, pieces: Sequence[Piece], is_mapped: bool, writer: CheckpointWriter) -> None:
        layer = self._table(pieces, is_mapped)
        places = []
        for piece in pieces:
            slot, dtype = writer.slot(piece.tensor.name), piece.tensor.out_dtype
            assert dtype.code is not None  # --dtype takes mergeable dtypes only
            places.append((slot.data_offset + piece.first * dtype.itemsize, slot.fd, dtype.code))
        with self._input_errors(pieces):
            written = self._operation.combine(layer, [piece.row for piece in pieces], output_table(places))
        for piece, crc in zip(pieces, written.crcs.tolist(), strict=True):
            itemsize = piece.tensor.out_dtype.itemsize
            writer.wrote(piece.tensor.name, piece.first * itemsize, piece.numel * itemsize, crc)
            self.nbytes_written += piece.numel * itemsize
        if written.num_nonfinite.any():
            self._nonfinite.check(pieces, layer, is_measured=False)
            for piece, count in zip(pieces, written.num_nonfinite.tolist(), strict=True):
                if count:
                    name = piece.tensor.name
                    self.num_nonfinite[name] = self.num_nonfinite.get(name, 0) + count

    def _is_unchanged(self, piece: Piece) -> bool:
        """Whether the output is the base's tensor, bit for bit, because no model changed it."""
        base = piece.tensor.base
        return base is not None and piece.tensor.out_dtype is base.dtype and self._operation.is_unchanged(piece.row)

    def _copy(self, tensor: TensorPlan, writer: CheckpointWriter) -> None:
        slot = writer.slot(tensor.name)
        source = tensor.base
        assert source is not None  # what is copied comes from the base
        try:
            crc = self._files.copy(source, slot.fd, slot.data_offset)
        except OSError as error:
            raise OutputError(
                f"cannot copy tensor {brief(tensor.name)} ({error.strerror})",
                where=slot.path.parent,
                got=f"an error while copying from {source.path}",
            ) from error
        writer.wrote(tensor.name, 0, source.nbytes, crc)
        self.nbytes_read += source.nbytes
        self.nbytes_written += source.nbytes

    @contextmanager
    def _input_errors(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Run kernels on these pieces, and let nothing pass that they made of bytes that are not the input's."""
        try:
            yield
        except FileOperandError as error:
            self._files.check_sizes()
            raise _io_error(error, pieces) from error
        except InputChangedError as error:
            self._files.check()
            names = ", ".join(dict.fromkeys(str(source.path) for piece in pieces for source in piece.sources))
            raise DataError("one of the files changed while it was read", where=names) from error
        self._files.check()

    def _table(self, pieces: Sequence[Piece], is_mapped: bool) -> LayerTable:
        rows = []
        for piece in pieces:
            rows.append([self._files.place(source, piece.first, is_mapped=is_mapped) for source in piece.sources])
        return layer_table(rows, [piece.numel for piece in pieces], pieces[0].tensor.base is not None)


class _Phases:
    """Tells the progress about phases: measuring and combining apart where they are two passes."""

    def __init__(self, progress: Progress | None, steps: Sequence[Step]) -> None:
        self._progress = progress
        actions = [step.action for step in steps if step.batch is not None]
        num_changes = sum(a != b for a, b in itertools.pairwise(actions))
        self._is_mixed = num_changes > 1
        self._name: str | None = None
        self._steps = steps

    def begin(self, step: Step) -> None:
        """Report a step that is about to run, so that a phase's time has its first batch in it."""
        self._enter("measure and combine" if self._is_mixed else step.action)

    def done(self, step: Step) -> None:
        """Report a finished step; of a batch that is measured and combined at once, the second one counts."""
        if self._progress is not None and step.batch is not None and not (self._is_mixed and step.action == "measure"):
            self._progress.advance(step.batch.nbytes)

    def finish(self) -> None:
        """End the phase that is under way."""
        if self._progress is not None and self._name is not None:
            self._progress.finish()
            self._name = None

    def _enter(self, name: str) -> None:
        if self._progress is not None and self._name != name:
            self.finish()
            self._name = name
            action = "measure" if name == "measure" else "combine"
            batches = (step.batch for step in self._steps if step.action == action)
            self._progress.start(name, sum(batch.nbytes for batch in batches if batch is not None))


def _alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return the pieces in groups that one kernel call can take: with as many models, and with a base or without."""
    groups: dict[tuple[int, bool], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((len(piece.tensor.models), piece.tensor.base is None), []).append(piece)
    return list(groups.values())


def _following(batches: Sequence[Batch | None]) -> list[Batch | None]:
    """Return for every step the batch of the next step that has one."""
    following: list[Batch | None] = []
    coming: Batch | None = None
    for batch in reversed(batches):
        following.append(coming)
        coming = batch or coming
    following.reverse()
    return following


def _io_error(error: OSError, pieces: Sequence[Piece]) -> CheckpointError | OutputError:
    """Return the error to raise for a file operand that could not be read or written."""
    tensor, operand = place_of(error)
    piece = pieces[tensor]
    if operand < 0:
        return OutputError(
            f"tensor {brief(piece.tensor.name)} cannot be written ({error.strerror})",
            hint="check the disk's free space, quota and health",
        )
    return CheckpointError(
        f"tensor {brief(piece.tensor.name)} cannot be read ({error.strerror})",
        where=piece.sources[operand].path,
        hint="the file changed while it was read, or its disk has failed",
    )
