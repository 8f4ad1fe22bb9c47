"""The sparse kernels through a device: masks, sums over what they keep, and the election, with the CPU's bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import _native
from . import sparse_tables
from .device_results import DeviceResults
from .launch_tables import BLOCK_NUMEL
from .slice_launches import prepare
from .slices import Extras, Slice, SliceChecksums, Transfer, bits_nbytes, cut_into_slices, reads_of, writes_of
from .sparse_tables import BITS, RANKED
from .streamed_keys import DeviceKeys, KeyRule, KeyStream
from .streamed_threshold import ThresholdStream
from .streaming import Job
from .tables import MEMORY, Written, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sparse_tables import SectionedLaunch
    from .streaming import Pipeline
    from .tables import LayerElection, LayerTable, MaskTable, OutputTable

# What ranks take on the device per element, of rows padded to powers of two: key and place, and a byte.
_RANKED_NBYTES = 2 * (8 + 1)


class SparseStream:
    """layer_threshold, layer_moments and layer_elect for one pipeline.

    Args:
        pipeline: what brings slices to the device.
        results: the way of sums and counts to the device and back.
    """

    def __init__(self, pipeline: Pipeline, results: DeviceResults) -> None:
        self._pipeline = pipeline
        self._results = results
        self._keys = KeyStream(pipeline)
        self.thresholds = ThresholdStream(pipeline, results, self._keys)

    def moments(self, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
        """See :class:`~metagpt_fast.backends.tables.Backend`. Leaves the bits of masks by rank for ``elect``."""
        pipeline, num_models = self._pipeline, masks.kinds.shape[1]
        made = self._made_masks(layer, masks, is_there=np.zeros(masks.kinds.shape, np.bool_))
        keys = self._keys.load(layer, KeyRule.of(masks))
        extras = made.extras(sparse_tables.masks_nbytes(num_models))
        # A block has its sums, and there are at most as many spans as blocks.
        slices = list(cut_into_slices(layer, None, pipeline.limits(2 * 8 * 6 * num_models), extras))
        sums = np.zeros((layer.num_tensors, num_models, 6))
        address = self._results.load(sums)
        job = Job(
            lambda part, slot, output: prepare(
                layer, None, part, slot, output, [made.section(part, keys, slot)], keys=keys
            ),
            lambda part: reads_of(part, layer) + made.reads(part),
            lambda part: [],
            lambda stream, launch: pipeline.device.layer_moments(stream, launch, pipeline.scratch, address),
        )
        pipeline.run(slices, job)
        self._results.store(sums)
        return sums

    def elect(self, layer: LayerTable, masks: MaskTable, election: LayerElection, out: OutputTable) -> Written:
        """See :class:`~metagpt_fast.backends.tables.Backend`."""
        pipeline, num_models = self._pipeline, masks.kinds.shape[1]
        made = self._made_masks(layer, masks, is_there=masks.bits != 0)
        keys = self._keys.load(layer, KeyRule.of(masks))
        nbytes = sparse_tables.masks_nbytes(num_models) + sparse_tables.election_nbytes(num_models)
        slices = list(cut_into_slices(layer, out, pipeline.limits(0), made.extras(nbytes)))
        num_nonfinite = np.zeros(layer.num_tensors, np.int64)
        address = self._results.load(num_nonfinite)
        checksums = SliceChecksums(out)

        def sections(part: Slice, slot: int) -> list[NDArray[np.uint8]]:
            return [made.section(part, keys, slot), sparse_tables.election_section(election, part.tensors)]

        job = Job(
            lambda part, slot, output: prepare(layer, out, part, slot, output, sections(part, slot), keys=keys),
            lambda part: reads_of(part, layer) + made.reads(part),
            lambda part: writes_of(part, out),
            lambda stream, launch: pipeline.device.layer_elect(stream, launch, address),
            checksums.add,
        )
        pipeline.run(slices, job)
        self._results.store(num_nonfinite)
        return Written(num_nonfinite, checksums.joined())

    def _made_masks(self, layer: LayerTable, masks: MaskTable, is_there: NDArray[np.bool_]) -> _MadeMasks:
        """Return masks of which those by rank are made, in host memory; ``is_there`` ``[K, T]``: from an earlier call.

        Ranks are those of whole rows, and sums want pieces that begin at spans: so rows have a pass of their own.
        """
        is_made = (masks.kinds == RANKED) & (layer.numels > 0)[:, None]
        addresses = np.where(is_made, masks.bits, 0).astype(np.uint64)
        rooms = []
        for k, t in np.argwhere(is_made & (addresses == 0)).tolist():
            rooms.append(np.empty(-(-int(layer.numels[k]) // 8), np.uint8))
            addresses[k, t] = rooms[-1].ctypes.data
        made = _MadeMasks(masks, is_made, addresses, rooms)
        wanted = is_made & ~is_there
        members = np.flatnonzero(wanted.any(axis=1))
        if members.size:
            with _native.operand_errors_of(members):
                self._rank(layer.take(members), masks.take(members), wanted[members], addresses[members])
        return made

    def _rank(
        self, layer: LayerTable, masks: MaskTable, wanted: NDArray[np.bool_], addresses: NDArray[np.uint64]
    ) -> None:
        """Write the bits of the masks that are wanted, bool ``[K, T]``, to these addresses."""
        pipeline, num_models = self._pipeline, masks.kinds.shape[1]
        rows_of(layer, masks.columns)  # raises for columns that are none
        keys = self._keys.load(layer, KeyRule.of(masks))
        kinds = np.where(wanted, RANKED, 0).astype(np.uint8)
        units = np.lcm(masks.columns, 8)  # whole rows, and whole bytes
        nbytes = sparse_tables.masks_nbytes(num_models) + sparse_tables.ranks_nbytes()
        extras = Extras(units, np.zeros_like(units), wanted.sum(axis=1), nbytes)
        slices = list(cut_into_slices(layer, None, pipeline.limits(_RANKED_NBYTES * BLOCK_NUMEL), extras))

        def prepared(part: Slice, slot: int, output: int) -> tuple[NDArray[np.uint8], SectionedLaunch]:
            columns = masks.columns[part.tensors]
            rows = part.numels // columns
            items = rows * (1 << np.ceil(np.log2(columns)).astype(np.int64))
            bits = output + _places(part, part.out_offsets, wanted)
            return prepare(
                layer,
                None,
                part,
                slot,
                output,
                [
                    sparse_tables.masks_section(keys.section(part), masks, part.tensors, kinds[part.tensors], bits),
                    sparse_tables.ranks_section(rows, items),
                ],
                keys=keys,
                num_rows=int(rows.sum()),
                num_items=int(items.sum()),
            )

        job = Job(
            prepared,
            lambda part: reads_of(part, layer),
            lambda part: _bits_transfers(part, part.out_offsets, wanted, addresses, -1),
            lambda stream, launch: pipeline.device.ranked_masks(stream, launch, pipeline.scratch),
        )
        pipeline.run(slices, job)


@dataclass(frozen=True)
class _MadeMasks:
    """Masks, some of which lie in host memory as bits.

    Attributes:
        masks: all of them.
        is_made: bool ``[K, T]``: which lie there.
        addresses: uint64 ``[K, T]``: where.
        rooms: the memory that is their own.
    """

    masks: MaskTable
    is_made: NDArray[np.bool_]
    addresses: NDArray[np.uint64]
    rooms: list[NDArray[np.uint8]]

    def extras(self, table_nbytes: int) -> Extras:
        """Return what pieces take besides operands."""
        none = Extras.none(len(self.is_made), table_nbytes)
        return Extras(none.units, self.is_made.sum(axis=1), none.bits_out, table_nbytes)

    def section(self, part: Slice, keys: DeviceKeys, slot: int) -> NDArray[np.uint8]:
        """Return the masks of a slice in the slot at this address."""
        kinds = np.where(self.is_made, BITS, self.masks.kinds)[part.tensors].astype(np.uint8)
        bits = slot + _places(part, part.bits_offsets, self.is_made)
        return sparse_tables.masks_section(keys.section(part), self.masks, part.tensors, kinds, bits)

    def reads(self, part: Slice) -> list[Transfer]:
        """Return the bits that are brought into a slice's slot."""
        return _bits_transfers(part, part.bits_offsets, self.is_made, self.addresses, -1)


def _places(part: Slice, starts: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return where in a slot the bits of each mask are, uint64 ``[P, T]``: the chosen ones, one behind the other."""
    own = chosen[part.tensors]
    numbers = np.cumsum(own, axis=1) - 1
    return np.where(own, starts[:, None] + numbers * bits_nbytes(part.numels)[:, None], 0).astype(np.uint64)


def _bits_transfers(
    part: Slice, starts: NDArray[np.int64], chosen: NDArray[np.bool_], addresses: NDArray[np.uint64], operand: int
) -> list[Transfer]:
    places = _places(part, starts, chosen)
    transfers = []
    for p, t in np.argwhere(chosen[part.tensors]).tolist():
        tensor = int(part.tensors[p])
        address = int(addresses[tensor, t]) + int(part.firsts[p]) // 8
        transfers.append(Transfer(int(places[p, t]), address, MEMORY, -(-int(part.numels[p]) // 8), tensor, operand))
    return transfers
