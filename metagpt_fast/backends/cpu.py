"""The compiled kernels on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .tables import LayerTable, OutputTable


class CpuBackend:
    """csrc/cpu behind the backend interface."""

    name = "cpu"

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        _native.layer_gram(layer.addresses, layer.files, layer.dtypes, layer.numels, layer.has_base, gram)

    def layer_merge(self, layer: LayerTable, coefficients: NDArray[np.float64], out: OutputTable) -> NDArray[np.int64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_merge(
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

    def layer_nonfinite(self, layer: LayerTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        return _native.layer_nonfinite(layer.addresses, layer.files, layer.dtypes, layer.numels, layer.has_base)
