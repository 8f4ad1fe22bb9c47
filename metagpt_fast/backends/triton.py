"""The Triton kernels as a backend: operands and outputs in the memory of one GPU, tables on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import triton_columns, triton_launches, triton_sparse
from .device_memory import DeviceMemory
from .tables import Written, add_grams, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tables import LayerElection, LayerTable, MaskTable, OutputTable


class TritonBackend:
    """kernels/ behind the backend interface, for one device.

    What returns arrays of the host waits for the device; the methods ``*_on_device`` do not.

    Args:
        device: torch's name of the device that all addresses are on, such as ``cuda:0``; ``cpu`` where Triton
            interprets (TRITON_INTERPRET=1).

    Raises:
        BackendError: kernels in Triton cannot run here.
    """

    name = "triton"

    def __init__(self, device: str = "cuda") -> None:
        self._memory = DeviceMemory(device)

    def gram_on_device(self, layer: LayerTable) -> Any:
        """Return the Gram matrices, a tensor float64 ``[K, V, V]`` on the device."""
        size = layer.num_operands
        gram = self._memory.zeros((layer.num_tensors, size, size))
        triton_launches.add_gram(self._memory, layer, gram)
        return gram

    def share_on_device(self, layer: LayerTable, gram: Any, scopes: Sequence[Sequence[int]], exponent: float) -> Any:
        """Return λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p of each tensor's scope, a tensor float64 ``[K, T]`` on the device."""
        coefficients = self._memory.zeros((layer.num_tensors, layer.num_operands - layer.has_base))
        triton_launches.share_of_squares(self._memory, gram, layer.has_base, scopes, exponent, coefficients)
        return coefficients

    def merge_on_device(
        self, layer: LayerTable, coefficients: Any, out: OutputTable, unchanged_by: Any | None = None
    ) -> Any:
        """Write the merged tensors. Return how many NaN and Inf were written, a tensor int64 ``[K]`` on the device.

        Args:
            layer: K tensors on the device.
            coefficients: float64 ``[K, T]`` or ``[T]``, numbers or a tensor.
            out: where the results go.
            unchanged_by: Gram matrices on the device; tensors that no model changed, by these, keep the base's bits.
        """
        shape = (layer.num_tensors, layer.num_operands - layer.has_base)
        num_nonfinite = self._memory.zeros((layer.num_tensors,), "int64")
        weights = self._memory.adopt(coefficients, shape)
        triton_launches.merge(self._memory, layer, weights, out, num_nonfinite, unchanged_by)
        return num_nonfinite

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        gram += self.gram_on_device(layer).cpu().numpy()

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _written(self.merge_on_device(layer, coefficients, out))

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        counts, firsts = (_to_host(each) for each in triton_launches.nonfinite(self._memory, layer))
        return counts, np.where(counts > 0, firsts, -1)

    def layer_row_divergence(self, layer: LayerTable, columns: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        if not layer.has_base or layer.num_operands != 2:
            raise ValueError(f"got {layer.num_operands} operands, expected a base and one model")
        rows_of(layer, columns)
        return triton_columns.row_divergence(self._memory, layer, columns)

    def column_gram(
        self, layer: LayerTable, columns: NDArray[np.int64], gram: Sequence[NDArray[np.float64]] | None = None
    ) -> list[NDArray[np.float64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        return add_grams(triton_columns.gram(self._memory, layer, columns), gram)

    def column_merge(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        coefficients: Sequence[NDArray[np.float64]],
        out: OutputTable,
    ) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        rows_of(layer, columns)
        num_models = layer.num_operands - layer.has_base
        for k, each in enumerate(coefficients):
            if each.shape != (columns[k], num_models):
                raise ValueError(f"coefficients: got {each.shape}, expected {(int(columns[k]), num_models)}")
        num_nonfinite = self._memory.zeros((layer.num_tensors,), "int64")
        triton_columns.merge(self._memory, layer, columns, coefficients, out, num_nonfinite)
        return _written(num_nonfinite)

    def layer_threshold(
        self,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
        ranks: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        lines = triton_sparse.Lines(self._memory, layer, columns, row_factors, key_kind)
        return triton_sparse.threshold(self._memory, layer, lines, key_kind, ranks)

    def layer_count_nonzero(
        self, layer: LayerTable, columns: NDArray[np.int64], row_factors: NDArray[np.uint64], key_kind: int
    ) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        lines = triton_sparse.Lines(self._memory, layer, columns, row_factors, key_kind)
        return triton_sparse.count_nonzero(self._memory, layer, lines, key_kind)

    def layer_moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return triton_sparse.moments(self._memory, layer, masks)

    def layer_elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        num_nonfinite = self._memory.zeros((layer.num_tensors,), "int64")
        triton_sparse.elect(self._memory, layer, masks, election, out, num_nonfinite)
        return _written(num_nonfinite)


def _written(num_nonfinite: Any) -> Written:
    """Return what has become of results that are all in the device's memory."""
    counts = _to_host(num_nonfinite)
    return Written(counts, np.zeros(len(counts), np.uint32))


def _to_host(tensor: Any) -> NDArray[np.int64]:
    result: NDArray[np.int64] = tensor.cpu().numpy()
    return result
