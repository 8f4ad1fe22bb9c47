"""What of a layer pass is done, by tensor: noted for the journal, and taken from it by a run that resumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .journal import pack_array, unpack_array
from .schedule import Piece, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .operations import Operation
    from .plan import TensorPlan
    from .writer import CheckpointWriter


class PassJournal:
    """Keeps count of what is measured and written.

    Args:
        tensors: the merged tensors, in the order of the operation's rows.
        operation: what measures and combines them.

    Attributes:
        measured: rows that need not be measured (any more).
        unchanged: names of tensors that were copied because no model changed them.
        num_nonfinite: output tensor name → elements that overflowed to Inf in the output dtype.
        num_resumed: tensors that a run before this one has written.
    """

    def __init__(self, tensors: Sequence[TensorPlan], operation: Operation) -> None:
        self._names = [tensor.name for tensor in tensors]
        self._row_of = {name: row for row, name in enumerate(self._names)}
        self._numels = [tensor.numel for tensor in tensors]
        self._operation = operation
        self._left: dict[str, NDArray[np.int64]] = {
            action: np.array(self._numels, np.int64) for action in ("measure", "combine")
        }
        self.measured: set[int] = set()
        self.unchanged: set[str] = set()
        self.num_nonfinite: dict[str, int] = {}
        self.num_resumed = 0

    def restore(self, writer: CheckpointWriter) -> None:
        """Take over what the run that ``writer`` resumes has measured and written."""
        for record in writer.records:
            if "measured" in record:
                rows = [self._row_of[name] for name in record["measured"]]
                self._operation.restore(rows, _unpack(record["state"]))
                self.measured.update(row for row in rows if self._numels[row] and self._operation.is_restorable(row))
            written = [name for name in record["written"] if writer.is_written(name)]
            self.num_resumed += len(written)
            self.unchanged.update(name for name in record.get("unchanged", ()) if writer.is_written(name))
            for name, count in record.get("num_nonfinite", {}).items():
                if writer.is_written(name):
                    self.num_nonfinite[name] = count
            if "coefficients" in record:
                rows = [self._row_of[name] for name in record["written"]]
                self._operation.coefficients[rows] = unpack_array(record["coefficients"])
                # Not those without elements: they are written by nobody, and done again.
                self.measured.update(row for row in map(self._row_of.__getitem__, written) if self._numels[row])

    def remaining(self, steps: Sequence[Step], scope_of_row: NDArray[np.int64], writer: CheckpointWriter) -> list[Step]:
        """Return the steps without what is done already."""
        written = {row for row, name in enumerate(self._names) if self._numels[row] and writer.is_written(name)}
        if not written and not self.measured:
            return list(steps)
        unsolved = {int(scope_of_row[row]) for row in range(len(self._names)) if row not in written}
        skipped = {"measure": self.measured, "combine": written}
        remaining = []
        for step in steps:
            if step.batch is None:
                if scopes := tuple(scope for scope in step.scopes if scope in unsolved):
                    remaining.append(Step(step.action, scopes=scopes))
            elif batch := step.batch.without(skipped[step.action]):
                remaining.append(Step(step.action, batch))
        return remaining

    def add_measured(self, pieces: Sequence[Piece], writer: CheckpointWriter) -> None:
        """Note that these pieces are measured."""
        if rows := self._completed("measure", pieces):
            state = {name: pack_array(array) for name, array in self._operation.state(rows).items()}
            writer.record({"measured": [self._names[row] for row in rows], "state": state})

    def add_written(self, pieces: Sequence[Piece], writer: CheckpointWriter) -> None:
        """Note that these pieces are in the output's files."""
        if rows := self._completed("combine", pieces):
            names = [self._names[row] for row in rows]
            facts: dict[str, Any] = {"coefficients": pack_array(self._operation.coefficients[rows])}
            if unchanged := [name for name in names if name in self.unchanged]:
                facts["unchanged"] = unchanged
            if counts := {name: self.num_nonfinite[name] for name in names if name in self.num_nonfinite}:
                facts["num_nonfinite"] = counts
            writer.record(facts, names)

    def _completed(self, action: str, pieces: Sequence[Piece]) -> list[int]:
        """Count the pieces, and return the rows of which they were the last."""
        left = self._left[action]
        for piece in pieces:
            left[piece.row] -= piece.numel
        return list(dict.fromkeys(piece.row for piece in pieces if left[piece.row] == 0))


def _unpack(state: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: unpack_array(packed) for name, packed in state.items()}
