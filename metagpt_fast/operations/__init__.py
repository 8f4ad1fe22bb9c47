"""Operations: measure → solve → combine on layers, whatever holds their bytes. They know kernels, and no files.

A method belongs to one of three kinds: linear combinations with coefficients for whole tensors, the same for each row
or column of a matrix, and sparse methods. The streamed merge and ``merge_state_dicts`` use them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..methods import SparseMethod
from .axis import AxisOperation
from .base import Operation, Row
from .linear import LinearOperation
from .sparse import SparseOperation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..backends import Backend


def make_operation(rows: Sequence[Row], backend: Backend, gram: NDArray[np.float64] | None = None) -> Operation:
    """Return what carries out the rows' methods, which are all of one kind.

    Args:
        rows: the tensors to merge, in the order of the Gram matrices.
        backend: what computes.
        gram: Gram matrices that were measured before, float64 ``[N, V, V]``; for linear methods.
    """
    if any(isinstance(row.method, SparseMethod) for row in rows):
        return SparseOperation(rows, backend)
    if any(row.method.axis is not None for row in rows):
        return AxisOperation(rows, backend)
    return LinearOperation(rows, backend, gram)


__all__ = ["AxisOperation", "LinearOperation", "Operation", "Row", "SparseOperation", "make_operation"]
