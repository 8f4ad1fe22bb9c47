"""A backend that streams layers through a device: operands in files or host memory, results there too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import _native
from .cpu import CpuBackend
from .device_results import DeviceResults
from .slice_launches import prepare
from .slices import SliceChecksums, cut_into_slices, reads_of, writes_of
from .sparse_tables import VARIANCE
from .streamed_columns import ColumnStream
from .streamed_keys import KeyRule
from .streamed_sparse import SparseStream
from .streaming import Job, Pipeline
from .tables import Written

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device import Device
    from .tables import LayerElection, LayerTable, MaskTable, OutputTable

_MAX_THREADS = 4  # that read, and that write: their memcpy is then faster than the bus


class StreamedBackend:
    """All kernels on a device, with the CPU's bits; ``layer_nonfinite`` and ``layer_row_divergence`` stay on the CPU.

    Args:
        device: where to compute. The backend closes it, also if this raises.
        device_nbytes: memory to take there, for any size of model; a layer's Gram matrices come on top.

    Raises:
        BackendError: the device does not have the memory.
    """

    name = "cuda"

    def __init__(self, device: Device, device_nbytes: int) -> None:
        self._device = device
        try:
            self._pipeline = Pipeline(device, device_nbytes, min(_native.num_threads(), _MAX_THREADS))
        except BaseException:
            device.close()
            raise
        self._results = DeviceResults(device, self._pipeline)
        self._sparse = SparseStream(self._pipeline, self._results)
        self._columns = ColumnStream(self._pipeline, self._results)

    def close(self) -> None:
        """Give the device's memory and the threads back."""
        self._pipeline.close()

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_pairs = layer.num_operands * (layer.num_operands + 1) // 2
        # A block has its sums, and there are at most as many spans as blocks.
        slices = list(cut_into_slices(layer, None, self._pipeline.limits(2 * 8 * num_pairs)))
        address = self._results.load(gram)
        job = Job(
            lambda part, slot, _: prepare(layer, None, part, slot, 0),
            lambda part: reads_of(part, layer),
            lambda part: [],
            lambda stream, launch: self._device.layer_gram(stream, launch, self._pipeline.scratch, address),
        )
        self._pipeline.run(slices, job)
        self._results.store(gram)

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        slices = list(cut_into_slices(layer, out, self._pipeline.limits(0)))
        num_nonfinite = np.zeros(layer.num_tensors, np.int64)
        address = self._results.load(num_nonfinite)
        checksums = SliceChecksums(out)
        job = Job(
            lambda part, slot, output: prepare(layer, out, part, slot, output, coefficients=coefficients, merges=True),
            lambda part: reads_of(part, layer),
            lambda part: writes_of(part, out),
            lambda stream, launch: self._device.layer_merge(stream, launch, address),
            checksums.add,
        )
        self._pipeline.run(slices, job)
        self._results.store(num_nonfinite)
        return Written(num_nonfinite, checksums.joined())

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`. On the CPU: it explains an error, once."""
        return CpuBackend().layer_nonfinite(layer)

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`. On the CPU: one pass of exponentials before others."""
        return CpuBackend().layer_row_divergence(layer, columns)

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._columns.gram(layer, columns, gram)

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._columns.merge(layer, columns, coefficients, out)

    def layer_threshold(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
        ranks: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._sparse.thresholds.threshold(layer, KeyRule(key_kind, columns, row_factors), ranks)

    def layer_count_nonzero(
        self, layer: LayerTable, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
    ) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_keys = 1 if key_kind == VARIANCE else layer.num_operands - 1
        return self._sparse.thresholds.count_nonzero(layer, KeyRule(key_kind, columns, row_factors), num_keys)

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._sparse.moments(layer, masks)

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return self._sparse.elect(layer, masks, election, out)
