"""NaN and Inf in the inputs: whose they are, and whether they end the merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import DataError
from .schedule import Piece
from .untrusted import brief

if TYPE_CHECKING:
    from .backends.tables import Backend, LayerTable


class NonfiniteInputs:
    """Looks for them, once a result says that there may be some.

    Args:
        labels: the models' names.
        backend: what counts them.
        is_allowed: whether they may be combined as they are.

    Attributes:
        owners: output tensor name → the models, or the base, whose tensors hold some that were allowed.
    """

    def __init__(self, labels: Sequence[str], backend: Backend, *, is_allowed: bool) -> None:
        self._labels = labels
        self._backend = backend
        self._is_allowed = is_allowed
        self.owners: dict[str, set[str]] = {}

    def check(self, pieces: Sequence[Piece], layer: LayerTable, *, is_measured: bool) -> None:
        """Count them in the layer of these pieces.

        Raises:
            DataError: there are some, and they are not allowed, or are part of what is measured.
        """
        counts, first = self._backend.layer_nonfinite(layer)
        for k, operand in np.argwhere(counts).tolist():
            piece, number = pieces[k], operand - layer.has_base
            owner = "the base" if number < 0 else self._labels[piece.tensor.columns[number]]
            if self._is_allowed and not is_measured:
                self.owners.setdefault(piece.tensor.name, set()).add(owner)
                continue
            ways = "to take this tensor from the base as it is, use --exclude"
            if not is_measured:
                ways += "; to merge it all the same, --allow-nonfinite"
            elif self._is_allowed:
                ways += "; it has no norm, so --allow-nonfinite cannot help a method that measures"
            raise DataError(
                f"tensor {brief(piece.tensor.name)} of {owner} holds NaN or Inf",
                where=piece.sources[operand].path,
                got=f"{counts[k, operand]} such elements, the first at index {piece.first + first[k, operand]}",
                expected="finite numbers",
                hint=f"the checkpoint is damaged or its training diverged; {ways}",
            )
