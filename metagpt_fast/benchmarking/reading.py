"""Reads the files of a merge as a merge does, and computes nothing with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _native
from ..backends.cpu import CpuBackend
from ..backends.tables import ITEMSIZES, MEMORY
from ..input_files import InputFiles
from ..layer_pass import LayerPass
from ..merging import plan_merge
from .prediction import WINDOW_NBYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..backends.tables import LayerTable
    from ..progress import Progress


def read_as_merge(base: Path, models: Sequence[Path], progress: Progress) -> int:
    """Read all weights once: prefetched, mapped and touched by the kernels' threads, in the order of a merge.

    Where ``--io auto`` is pread, the kernels do read into their buffers, and compute.

    Args:
        base: folder of the base.
        models: folders of the others.
        progress: is told of the bytes, as by a merge.

    Returns:
        The bytes read.
    """
    plan = plan_merge(base, models)
    with InputFiles(shard for checkpoint in plan.checkpoints for shard in checkpoint.shards) as files:
        layers = LayerPass(plan, files, _Reading(), window_nbytes=WINDOW_NBYTES, progress=progress)
        layers.measure()
    return layers.nbytes_read


class _Reading(CpuBackend):
    """Touches every byte in the place of measuring."""

    def layer_gram(self, layer: LayerTable, gram: NDArray[np.float64]) -> None:
        if (layer.files != MEMORY).any():
            super().layer_gram(layer, gram)
            return
        for addresses, dtypes, numel in zip(layer.addresses, layer.dtypes, layer.numels.tolist(), strict=True):
            for address, itemsize in zip(addresses.tolist(), ITEMSIZES[dtypes].tolist(), strict=True):
                _native.bandwidth_read(address, numel * itemsize)
