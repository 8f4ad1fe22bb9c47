"""The compiled kernels on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _native
from .tables import Written, addresses_of, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tables import LayerElection, LayerTable, MaskTable, OutputTable


class CpuBackend:
    """csrc/cpu behind the backend interface.

    Raises:
        BackendError: METAGPT_FAST_ISA names an instruction set that this machine does not support.
    """

    name = "cpu"

    def __init__(self) -> None:
        _native.isa()

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        _native.layer_gram(layer.addresses, layer.files, layer.dtypes, layer.numels, layer.has_base, gram)

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return Written(
            *_native.layer_merge(
                layer.addresses,
                layer.files,
                layer.dtypes,
                layer.numels,
                layer.has_base,
                coefficients,
                out.addresses,
                out.files,
                out.dtypes,
            )
        )

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_nonfinite(layer.addresses, layer.files, layer.dtypes, layer.numels, layer.has_base)

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        if not layer.has_base or layer.num_operands != 2:
            raise ValueError(f"got {layer.num_operands} operands, expected a base and one model")
        shapes = [(int(rows),) for rows in rows_of(layer, columns)]
        divergences = [np.zeros(shape) for shape in shapes]
        _native.layer_row_divergence(
            layer.addresses, layer.files, layer.dtypes, layer.numels, columns, addresses_of(divergences, shapes)
        )
        return divergences

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)  # before arrays of these sizes are made
        shapes = [(int(c), layer.num_operands, layer.num_operands) for c in columns]
        grams = [np.zeros(shape) for shape in shapes] if gram is None else list(gram)
        _native.column_gram(
            layer.addresses,
            layer.files,
            layer.dtypes,
            layer.numels,
            layer.has_base,
            columns,
            addresses_of(grams, shapes),
        )
        return grams

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_models = layer.num_operands - layer.has_base
        return Written(
            *_native.column_merge(
                layer.addresses,
                layer.files,
                layer.dtypes,
                layer.numels,
                layer.has_base,
                columns,
                addresses_of(coefficients, [(int(c), num_models) for c in columns]),
                out.addresses,
                out.files,
                out.dtypes,
            )
        )

    def layer_threshold(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
        ranks: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_threshold(*_tensors(layer), columns, row_factors, key_kind, ranks)

    def layer_count_nonzero(
        self, layer: LayerTable, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
    ) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_count_nonzero(*_tensors(layer), columns, row_factors, key_kind)

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_moments(*_tensors(layer), _fields(masks))

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return Written(*_native.layer_elect(*_tensors(layer), _fields(masks), _fields(election), _fields(out)))


def _tensors(layer: LayerTable) -> _native.Tensors:
    return layer.addresses, layer.files, layer.dtypes, layer.numels


def _fields(table: MaskTable | LayerElection | OutputTable) -> tuple[Any, ...]:
    """Return the table's columns in the order of its fields, as the native kernels take them."""
    return tuple(getattr(table, field.name) for field in dataclasses.fields(table))
