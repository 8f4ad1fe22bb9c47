"""Launches of the sparse kernels in Triton: thresholds, masks, moments, elections. See :mod:`.triton_launches`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels import launch
from .triton_launches import Group, Tables, add_partials, groups_of, upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device_memory import DeviceMemory
    from .tables import LayerElection, LayerTable, MaskTable, OutputTable

_RANKED = 3
_VARIANCE, _IMPORTANCE = 1, 2
_NO_KEY = 0xFFFFFFFF
_STEPS = (24, 16, 8, 0)  # bits below those that a pass looks at
_INDEX_WIDTH = 1024
_MOST_SORTED = 1 << 24  # elements of DELLA's rows that are sorted at a time
_RANKED_BLOCK = 1024


class Lines:
    """Elements per row, and factors of rows, of a layer's tensors: a table on the device; owns the factors there."""

    def __init__(
        self,
        memory: DeviceMemory,
        layer: LayerTable,
        columns: NDArray[np.int64],
        row_factors: NDArray[np.uint64],
        key_kind: int,
    ) -> None:
        lines = np.zeros((layer.num_tensors, 2), np.int64)
        lines[:, 0] = np.maximum(columns, 1)
        self._factors = []
        for k in range(layer.num_tensors) if key_kind == _IMPORTANCE else ():
            num_rows = int(layer.numels[k]) // int(lines[k, 0])
            if num_rows:
                factors = memory.upload(read_host(int(row_factors[k]), num_rows))
                self._factors.append(factors)
                lines[k, 1] = factors.data_ptr()
        self.table = memory.upload(lines)


def read_host(address: int, count: int) -> NDArray[np.float64]:
    """Return float64 numbers from an address in the host's memory, copied."""
    import ctypes

    values: NDArray[np.float64] = np.array((ctypes.c_double * count).from_address(address), np.float64)
    return values


def threshold(
    memory: DeviceMemory, layer: LayerTable, lines: Lines, key_kind: int, ranks: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return keys and indices of the elements of these ranks, ``[K, J, R]``: see :class:`~.tables.Backend`."""
    from ..kernels import layer_threshold as kernels

    num_keys, num_ranks = ranks.shape[1:]
    states = memory.upload(np.stack([np.zeros_like(ranks), ranks], axis=-1))
    histograms = memory.zeros((*ranks.shape, 256), "int64")
    indices = memory.zeros(ranks.shape, "int64")
    launches = [_Launch(memory, group, key_kind) for group in groups_of(layer)]
    sizes = {"NUM_KEYS": num_keys, "NUM_RANKS": num_ranks}
    with memory.current():
        for shift in _STEPS:
            for each in launches:
                kernels.layer_threshold_histogram_kernel[each.grid](
                    *each.tables_of_tiles, lines.table, states, histograms, shift, **each.constants, **sizes
                )
            if ranks.size:
                kernels.layer_threshold_step_kernel[(ranks.size,)](states, histograms)
        for each in launches:
            ties = memory.empty((num_keys, num_ranks, each.tables.num_programs), "int32")
            programs = each.tables.num_programs
            kernels.layer_threshold_ties_kernel[each.grid](
                *each.tables_of_tiles, lines.table, states, ties, programs, **each.constants, **sizes
            )
            kernels.layer_threshold_index_kernel[(len(each.group.members),)](
                *each.tables_of_tiles,
                each.tables.first_programs,
                lines.table,
                states,
                ties,
                programs,
                indices,
                **each.constants,
                **sizes,
                WIDTH=_INDEX_WIDTH,
            )
    is_found = (ranks >= 0) & (layer.numels > 0)[:, None, None]
    keys = np.where(is_found, states.cpu().numpy()[..., 0], _NO_KEY).astype(np.uint32)
    return keys, np.where(is_found, indices.cpu().numpy(), -1)


def count_nonzero(memory: DeviceMemory, layer: LayerTable, lines: Lines, key_kind: int) -> NDArray[np.int64]:
    """Return how many keys are above 0, int64 ``[K, J]``."""
    from ..kernels.layer_threshold import layer_count_nonzero_kernel

    num_keys = 1 if key_kind == _VARIANCE else layer.num_operands - 1
    counts = memory.zeros((layer.num_tensors, num_keys), "int64")
    with memory.current():
        for group in groups_of(layer):
            each = _Launch(memory, group, key_kind)
            layer_count_nonzero_kernel[each.grid](
                *each.tables_of_tiles, lines.table, counts, **each.constants, NUM_KEYS=num_keys
            )
    result: NDArray[np.int64] = counts.cpu().numpy()
    return result


class Masks:
    """A table of masks on the device; owns the masks that are made before."""

    def __init__(self, memory: DeviceMemory, layer: LayerTable, masks: MaskTable) -> None:
        self.kinds = masks.kinds
        self.key_kind = masks.key_kind
        self.lines = Lines(memory, layer, masks.columns, masks.row_factors, masks.key_kind)
        self._made: list[Any] = []
        fields = np.zeros((*masks.kinds.shape, 8), np.int64)
        fields[..., :2] = masks.keys
        fields[..., 2:4] = masks.indices
        fields[..., 4] = masks.probabilities[..., 0].astype(np.int64)
        fields[..., 6] = masks.streams.view(np.int64)
        fields[..., 7] = np.ascontiguousarray(masks.values).view(np.int64)
        for k, t in np.argwhere(masks.kinds == _RANKED).tolist():
            if layer.numels[k]:
                made = self._make_ranked(memory, layer.take([k]), masks, k, t)
                fields[k, t, 5] = made.data_ptr()
                self._made.append(made)
        self.table = memory.upload(fields)

    def _make_ranked(self, memory: DeviceMemory, layer: LayerTable, masks: MaskTable, k: int, t: int) -> Any:
        """Return DELLA's mask, uint8 ``[numel]``: torch sorts rows by their keys, a kernel draws."""
        from ..kernels.layer_threshold import layer_keys_kernel
        from ..kernels.ranked_mask import ranked_mask_kernel

        numel, columns = int(layer.numels[0]), max(int(masks.columns[k]), 1)
        (group,) = groups_of(layer)
        each = _Launch(memory, group, self.key_kind)
        own = Lines(memory, layer, masks.columns[k : k + 1], masks.row_factors[k : k + 1], self.key_kind)
        keys = memory.empty((numel,), "int32")
        mask = memory.empty((numel,), "uint8")
        low, high = (float(p) for p in masks.probabilities[k, t])
        shares = np.arange(columns) / max(columns - 1, 1)
        by_rank = np.minimum(np.floor(low + (high - low) * shares), 2**32 - 1)
        probabilities = memory.upload(by_rank.astype(np.int64))
        stream = memory.upload(masks.streams[k, t : t + 1].view(np.int64))
        rows_at_a_time = max(1, _MOST_SORTED // columns)
        with memory.current():
            layer_keys_kernel[each.grid](*each.tables_of_tiles, own.table, keys, **each.constants, MODEL=t)
            for first in range(0, numel, rows_at_a_time * columns):
                part = keys[first : first + rows_at_a_time * columns].view(-1, columns)
                order = part.sort(dim=1, stable=True).indices
                ranked_mask_kernel[(-(-part.numel() // _RANKED_BLOCK),)](
                    order, probabilities, stream, mask[first:], first, part.numel(), columns, BLOCK=_RANKED_BLOCK
                )
        return mask


def moments(memory: DeviceMemory, layer: LayerTable, masks: MaskTable) -> NDArray[np.float64]:
    """Return the sums over masked task vectors, float64 ``[K, T, 6]``: see :class:`~.tables.Backend`."""
    from ..kernels.layer_moments import layer_moments_kernel

    table = Masks(memory, layer, masks)
    sums = memory.zeros((*masks.kinds.shape, 6))
    size = masks.kinds.shape[1] * 6
    targets = memory.upload(np.repeat(np.arange(size, dtype=np.int64)[:, None], 2, axis=1))
    for group in groups_of(layer, kinds=masks.kinds):
        each = _Launch(memory, group, masks.key_kind)
        partials = memory.empty((size, each.tables.num_programs))
        with memory.current():
            layer_moments_kernel[each.grid](
                *each.tables_of_tiles,
                table.table,
                table.lines.table,
                partials,
                each.tables.num_programs,
                **each.constants,
                KINDS=group.kinds,
            )
        add_partials(memory, group, each.tables, partials, targets, sums)
    result: NDArray[np.float64] = sums.cpu().numpy()
    return result


def elect(
    memory: DeviceMemory,
    layer: LayerTable,
    masks: MaskTable,
    election: LayerElection,
    out: OutputTable,
    nonfinite: Any,
) -> None:
    """Write ``base + λ Σ scale δ m / Σ weight``; add the NaN and Inf written to ``nonfinite``, int64 ``[K]``."""
    from ..kernels.layer_elect import layer_elect_kernel

    table = Masks(memory, layer, masks)
    factors = (election.scales, election.votes, election.weights, election.uniques)
    elections = memory.upload(np.stack(factors, axis=1).astype(np.float64))
    rules = (election.lambdas, election.floors, election.elects, election.normalizes)
    rules_on_device = memory.upload(np.stack(rules, axis=1).astype(np.float64))
    for group in groups_of(layer, out, kinds=masks.kinds):
        each = _Launch(memory, group, masks.key_kind)
        with memory.current():
            layer_elect_kernel[each.grid](
                *each.tables_of_tiles,
                table.table,
                table.lines.table,
                elections,
                rules_on_device,
                nonfinite,
                **each.constants,
                OUT_DTYPE=group.out_dtype,
                KINDS=group.kinds,
            )


class _Launch:
    """What the sparse kernels' launches over one group have in common."""

    def __init__(self, memory: DeviceMemory, group: Group, key_kind: int) -> None:
        parameters = launch.sparse_launch(group.dtypes)
        self.group = group
        self.tables: Tables = upload(memory, group, parameters.block_numel)
        self.grid = (self.tables.num_programs,)
        self.tables_of_tiles = (self.tables.records, self.tables.entries, self.tables.tiles_per_entry)
        self.constants: dict[str, Any] = {
            "DTYPES": group.dtypes,
            "KEY_KIND": key_kind,
            "WIDE": group.is_wide,
            "ALIGNMENT": group.alignment,
            "BLOCK": parameters.block_numel,
            "num_warps": parameters.num_threads // memory.warp_size,
            "enable_fp_fusion": False,
        }
