"""column_gram and column_merge through a device: every column of a matrix is a tensor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import sparse_tables
from .slice_launches import prepare
from .slices import Extras, Slice, SliceChecksums, cut_into_slices, reads_of, writes_of
from .streaming import Job
from .tables import LayerTable, OutputTable, Written, add_grams, addresses_of, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device_results import DeviceResults
    from .streaming import Pipeline

    FloatArray = NDArray[np.float64]


class ColumnStream:
    """The kernels of columns for one pipeline.

    Args:
        pipeline: what brings slices to the device.
        results: the way of Gram matrices, coefficients and counts; all columns of a layer are there at once.
    """

    def __init__(self, pipeline: Pipeline, results: DeviceResults) -> None:
        self._pipeline = pipeline
        self._results = results

    def gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[FloatArray] | None = None
    ) -> list[FloatArray]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)  # raises for columns that are none
        size, num_pairs = layer.num_operands, layer.num_operands * (layer.num_operands + 1) // 2
        starts = np.cumsum(columns) - columns
        num_columns = int(columns.sum())
        # Behind the matrices: sums of blocks that go on in the next piece.
        together = np.zeros(num_columns * (size * size + num_pairs))
        matrices = together[: num_columns * size * size].reshape(num_columns, size, size)
        grams = np.split(matrices, starts[1:])
        if gram is not None:
            add_grams(gram, grams)
        units = np.maximum(columns, 1)  # whole rows
        none = Extras.none(layer.num_tensors)
        extras = Extras(units, none.bits_in, none.bits_out, sparse_tables.columns_nbytes())
        slices = list(cut_into_slices(layer, None, self._pipeline.limits(0), extras))
        address = self._results.load(together)
        open_sums = address + matrices.nbytes
        job = Job(
            lambda part, slot, output: prepare(
                layer,
                None,
                part,
                slot,
                output,
                [_section(layer, part, columns, starts, num_pairs)],
                num_sums=int(columns[part.tensors].sum()) * num_pairs,
            ),
            lambda part: reads_of(part, layer),
            lambda part: [],
            lambda stream, launch: self._pipeline.device.column_gram(stream, launch, address, open_sums),
        )
        self._pipeline.run(slices, job)
        self._results.store(matrices)
        if gram is None:
            return grams
        for total, own in zip(gram, grams, strict=True):
            total[...] = own
        return list(gram)

    def merge(
        self, layer: LayerTable, columns: NDArray[np.int64], coefficients: Sequence[FloatArray], out: OutputTable
    ) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        num_models = layer.num_operands - layer.has_base
        addresses_of(coefficients, [(int(c), num_models) for c in columns])  # raises for other shapes
        starts = np.cumsum(columns) - columns
        flat = np.concatenate([each.reshape(-1) for each in coefficients])
        together = np.concatenate([np.zeros(layer.num_tensors, np.int64).view(np.float64), flat])
        extras = Extras.none(layer.num_tensors, sparse_tables.columns_nbytes())
        slices = list(cut_into_slices(layer, out, self._pipeline.limits(0), extras))
        num_nonfinite = np.zeros(layer.num_tensors, np.int64)
        counts = self._results.load(together)
        values = counts + num_nonfinite.nbytes
        checksums = SliceChecksums(out)
        job = Job(
            lambda part, slot, output: prepare(
                layer, out, part, slot, output, [_section(layer, part, columns, starts, 0)], merges=True
            ),
            lambda part: reads_of(part, layer),
            lambda part: writes_of(part, out),
            lambda stream, launch: self._pipeline.device.column_merge(stream, launch, values, counts),
            checksums.add,
        )
        self._pipeline.run(slices, job)
        self._results.store(num_nonfinite)
        return Written(num_nonfinite, checksums.joined())


def _section(
    layer: LayerTable, part: Slice, columns: NDArray[np.int64], starts: NDArray[np.int64], num_pairs: int
) -> NDArray[np.uint8]:
    tensors = part.tensors
    is_last = part.firsts + part.numels == layer.numels[tensors]
    return sparse_tables.columns_section(columns[tensors], part.firsts, starts[tensors], is_last, num_pairs)
