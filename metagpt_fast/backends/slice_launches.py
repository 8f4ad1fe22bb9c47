"""The table and the launch of a slice, with sections of columns behind the table for the kernels that take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .launch_tables import DeviceTable, pack
from .sparse_tables import SectionedLaunch, join

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .slices import Slice
    from .streamed_keys import DeviceKeys
    from .tables import LayerTable, OutputTable


def prepare(
    layer: LayerTable,
    out: OutputTable | None,
    part: Slice,
    slot: int,
    output: int,
    sections: Sequence[NDArray[np.uint8]] = (),
    *,
    coefficients: NDArray[np.float64] | None = None,
    merges: bool = False,
    keys: DeviceKeys | None = None,
    rows: NDArray[np.int64] | None = None,
    num_keys: int = 0,
    num_ranks: int = 0,
    num_rows: int = 0,
    num_items: int = 0,
    num_sums: int = 0,
) -> tuple[NDArray[np.uint8], SectionedLaunch]:
    """Return a slice's table with its sections, and its launch, for slots at these addresses.

    ``coefficients``: of the layer's tensors, float64 ``[K, T]``, where the kernel takes them from the table.
    ``keys``: what elements are ranked by, where the kernel ranks them.
    ``merges``: whether arithmetic is in fp64 where the output is F64, and not only where an operand is.
    ``rows``: where in the results a piece's are, int64 ``[P]``; default by its tensor's number in the layer. See
    :class:`~metagpt_fast.backends.sparse_tables.SectionedLaunch` for the others.
    """
    tensors, num_pieces = part.tensors, len(part.tensors)
    num_models = layer.num_operands - layer.has_base
    table = DeviceTable(
        addresses=(slot + part.offsets).astype(np.uint64),
        dtypes=layer.dtypes[tensors],
        numels=part.numels,
        has_base=layer.has_base,
        rows=tensors if rows is None else rows,
        out_addresses=np.zeros(num_pieces, np.uint64) if out is None else (output + part.out_offsets).astype(np.uint64),
        out_dtypes=np.zeros(num_pieces, np.uint8) if out is None else out.dtypes[tensors],
        coefficients=np.zeros((num_pieces, num_models)) if coefficients is None else coefficients[tensors],
    )
    packed, num_blocks, num_spans, kinds = pack(table, merges=merges)
    together, starts = join(packed, sections)
    launch = SectionedLaunch(
        table_address=slot,
        num_tensors=num_pieces,
        num_operands=layer.num_operands,
        has_base=layer.has_base,
        num_blocks=num_blocks,
        num_spans=num_spans,
        kinds=kinds,
        reads=(slot, part.nbytes),
        writes=(output, part.out_nbytes),
        key_kind=keys.rule.kind if keys else 0,
        factors=keys.memory if keys else (0, 0),
        sections=tuple(slot + start for start in starts),
        num_keys=num_keys,
        num_ranks=num_ranks,
        num_rows=num_rows,
        num_items=num_items,
        num_sums=num_sums,
    )
    return together, launch
