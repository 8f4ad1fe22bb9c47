"""Launches of the Triton kernels over a layer in device memory, on the current stream; nothing waits.

Tensors whose operands have the same dtypes and lie alike are one launch; a layer is as a rule one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError
from ..kernels import launch
from .tables import MEMORY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device_memory import DeviceMemory
    from .tables import LayerTable, OutputTable

_REDUCE_WIDTH = 4096
_MOST_WIDE_PROGRAMS = 512
_SCOPE_WIDTH = 64


@dataclass(frozen=True)
class Group:
    """Tensors of a layer that one launch takes.

    Attributes:
        members: which tensors, by their number in the layer.
        dtypes: codes of the operands.
        out_dtype: code of the output; the first operand's where there is none.
        alignment: how operands and output lie: see :mod:`metagpt_fast.kernels.launch`.
        kinds: of the masks, by model; empty where there are none.
        records: int64 ``[K, V + 3]``: number in the layer, numel, addresses of operands and output (0 without one).
    """

    members: tuple[int, ...]
    dtypes: tuple[int, ...]
    out_dtype: int
    alignment: int
    kinds: tuple[int, ...]
    records: NDArray[np.int64]

    @property
    def is_wide(self) -> bool:
        """Return whether F64 is among the operands."""
        return launch.F64 in self.dtypes


def groups_of(
    layer: LayerTable,
    out: OutputTable | None = None,
    operands: Sequence[int] | None = None,
    kinds: NDArray[np.uint8] | None = None,
) -> list[Group]:
    """Return the launches for a layer, or for some of its operands; tensors without elements are left out.

    Args:
        layer: K tensors.
        out: where their results go, if there are any.
        operands: which operands; default all.
        kinds: ``[K, T]`` kinds of masks, which are compiled into the kernels; default none.

    Raises:
        BackendError: something lies in a file.
    """
    chosen = list(range(layer.num_operands)) if operands is None else list(operands)
    if (layer.files != MEMORY).any() or (out is not None and (out.files != MEMORY).any()):
        raise BackendError(
            "the Triton backend does not read or write files",
            where="backend",
            expected="tensors in device memory",
            hint="merge files with the cpu backend",
        )
    found: dict[tuple[tuple[int, ...], int, int, tuple[int, ...]], list[int]] = {}
    for k in np.flatnonzero(layer.numels).tolist():
        dtypes = tuple(layer.dtypes[k, chosen].tolist())
        addresses = layer.addresses[k, chosen].tolist()
        out_dtype = dtypes[0]
        if out is not None:
            out_dtype = int(out.dtypes[k])
            addresses.append(int(out.addresses[k]))
        alignment = launch.alignment_of(addresses, (*dtypes, out_dtype) if out is not None else dtypes)
        own_kinds = () if kinds is None else tuple(kinds[k].tolist())
        found.setdefault((dtypes, out_dtype, alignment, own_kinds), []).append(k)
    groups = []
    for (dtypes, out_dtype, alignment, own_kinds), members in found.items():
        outputs = np.zeros(len(members), np.uint64) if out is None else out.addresses[members]
        columns = (
            np.array(members, np.uint64),
            layer.numels[members].astype(np.uint64),
            *layer.addresses[np.ix_(members, chosen)].T,
            outputs,
        )
        records = np.stack(columns, axis=1).view(np.int64)
        groups.append(Group(tuple(members), dtypes, out_dtype, alignment, own_kinds, np.ascontiguousarray(records)))
    return groups


@dataclass(frozen=True)
class Tables:
    """A group's tables on the device, and the size of its grid."""

    records: Any
    entries: Any
    first_programs: Any
    tiles_per_entry: int
    num_programs: int


def upload(memory: DeviceMemory, group: Group, block_numel: int) -> Tables:
    """Cut the group's tensors into tiles and copy the tables to the device, all in one."""
    tiles = launch.cut(group.records[:, 1].tolist(), block_numel)
    parts = [group.records.reshape(-1), tiles.entries.reshape(-1), tiles.first_programs]
    # Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    starts = np.cumsum([0, *(part.size + part.size % 2 for part in parts)]).tolist()
    together = np.zeros(starts[-1], np.int64)
    for start, part in zip(starts, parts, strict=False):
        together[start : start + part.size] = part
    on_device = memory.upload(together)
    records, entries, first_programs = (
        on_device[start : start + part.size] for start, part in zip(starts, parts, strict=False)
    )
    return Tables(records, entries, first_programs, tiles.tiles_per_entry, tiles.num_programs)


def add_gram(memory: DeviceMemory, layer: LayerTable, gram: Any) -> None:
    """Add the layer's Gram matrices to ``gram``, float64 ``[K, V, V]`` on the device."""
    size = layer.num_operands
    for operands, wanted in launch.operand_groups(size, layer.has_base):
        num_pairs = launch.num_pairs(len(operands))
        targets = np.full((num_pairs, 2), -1, np.int64)
        pairs = [(i, j) for a, i in enumerate(operands) for j in operands[a:]]
        asked = set(wanted)
        for pair, (i, j) in enumerate(pairs):
            if (i, j) in asked:
                targets[pair] = (i * size + j, j * size + i)
        targets_on_device = memory.upload(targets)
        for group in groups_of(layer, operands=operands):
            _add_group(memory, group, layer.has_base, targets_on_device, gram)


def _add_group(memory: DeviceMemory, group: Group, has_base: bool, targets: Any, gram: Any) -> None:
    from ..kernels.layer_gram import layer_gram_kernel, layer_gram_wide_kernel

    num_pairs = launch.num_pairs(len(group.dtypes))
    wide = launch.wide_gram_launch(group.dtypes)
    tables = upload(memory, group, wide.block_numel)
    partials = memory.empty((num_pairs, tables.num_programs))
    doubtful = memory.zeros((1 + (0 if group.is_wide else tables.num_programs),), "int32")
    arguments = (
        tables.records,
        tables.entries,
        tables.tiles_per_entry,
        partials,
        tables.num_programs,
        doubtful,
    )
    constants = {
        "DTYPES": group.dtypes,
        "HAS_BASE": has_base,
        "ALIGNMENT": group.alignment,
        "BLOCK": wide.block_numel,
        "PAIRS": launch.power_of_two(num_pairs),
        "enable_fp_fusion": True,  # sums need no particular roundings
    }
    with memory.current():
        if not group.is_wide:
            narrow = launch.gram_launch(group.dtypes)
            layer_gram_kernel[(tables.num_programs,)](
                *arguments,
                **constants,
                LANES=narrow.num_threads,
                RUN=narrow.run_numel,
                num_warps=narrow.num_threads // memory.warp_size,
            )
        num_wide = tables.num_programs if group.is_wide else min(tables.num_programs, _MOST_WIDE_PROGRAMS)
        layer_gram_wide_kernel[(num_wide,)](
            *arguments,
            **constants,
            CHUNK=wide.chunk_numel,
            LANES=wide.num_threads,
            RUN=wide.run_numel,
            EVERY=group.is_wide,
            num_warps=wide.num_threads // memory.warp_size,
        )
    add_partials(memory, group, tables, partials, targets, gram)


def add_partials(memory: DeviceMemory, group: Group, tables: Tables, partials: Any, targets: Any, sums: Any) -> None:
    """Add up what the programs of each tensor found.

    Args:
        memory: the device.
        group: the tensors.
        tables: of the launch that wrote the partial sums.
        partials: float64 ``[P, programs]``.
        targets: int64 ``[P, 2]``: where in a tensor's part of ``sums`` each goes, twice if it goes to two places.
        sums: float64 ``[K, ...]``, added to.
    """
    from ..kernels.layer_gram import layer_gram_reduce_kernel

    with memory.current():
        layer_gram_reduce_kernel[(len(group.members), int(partials.shape[0]))](
            tables.records,
            tables.first_programs,
            partials,
            tables.num_programs,
            targets,
            sums,
            STRIDE=len(group.dtypes) + 3,
            MATRIX=sums[0].numel(),
            WIDTH=_REDUCE_WIDTH,
            num_warps=256 // memory.warp_size,
            enable_fp_fusion=False,
        )


def merge(
    memory: DeviceMemory,
    layer: LayerTable,
    coefficients: Any,
    out: OutputTable,
    nonfinite: Any,
    gram: Any | None = None,
) -> None:
    """Write the merged tensors.

    Args:
        memory: the device.
        layer: K tensors on it.
        coefficients: float64 ``[K, T]`` on the device.
        out: where the results go.
        nonfinite: int64 ``[K]`` on the device; how many NaN and Inf are written is added.
        gram: float64 ``[K, V, V]`` on the device: tensors that no model changed, by this, keep the base's bits where
            the output has the base's dtype.
    """
    from ..kernels.layer_merge import layer_merge_kernel

    for group in groups_of(layer, out):
        parameters = launch.merge_launch(group.dtypes, group.out_dtype)
        tables = upload(memory, group, parameters.block_numel)
        keeps = gram is not None and layer.has_base and group.out_dtype == group.dtypes[0]
        with memory.current():
            layer_merge_kernel[(tables.num_programs,)](
                tables.records,
                tables.entries,
                tables.tiles_per_entry,
                coefficients,
                gram if keeps else coefficients,
                nonfinite,
                DTYPES=group.dtypes,
                OUT_DTYPE=group.out_dtype,
                HAS_BASE=layer.has_base,
                KEEPS=keeps,
                WIDE=group.is_wide or group.out_dtype == launch.F64,
                ALIGNMENT=group.alignment,
                BLOCK=parameters.block_numel,
                num_warps=parameters.num_threads // memory.warp_size,
                enable_fp_fusion=False,
            )


def share_of_squares(
    memory: DeviceMemory, gram: Any, has_base: bool, scopes: Sequence[Sequence[int]], exponent: float, coefficients: Any
) -> None:
    """Write MetaGPT's λ of every scope into the rows of its members.

    Args:
        memory: the device.
        gram: float64 ``[K, V, V]`` on it.
        has_base: whether the first operand is the base.
        scopes: the tensors of each scope.
        exponent: p.
        coefficients: float64 ``[K, T]`` on the device.
    """
    from ..kernels.layer_fused import share_of_squares_kernel

    members = np.array([row for scope in scopes for row in scope], np.int64)
    first_members = np.cumsum([0, *(len(scope) for scope in scopes)]).astype(np.int64)
    num_models = int(gram.shape[1]) - has_base
    with memory.current():
        share_of_squares_kernel[(len(scopes),)](
            gram,
            memory.upload(members),
            memory.upload(first_members),
            memory.upload(np.array([exponent], np.float64)),
            coefficients,
            HAS_BASE=has_base,
            NUM_MODELS=num_models,
            MODELS=launch.power_of_two(num_models),
            WIDTH=_SCOPE_WIDTH,
            num_warps=1,
            enable_fp_fusion=False,
        )


def nonfinite(memory: DeviceMemory, layer: LayerTable) -> tuple[Any, Any]:
    """Return per operand how many elements are NaN or Inf, and the index of the first (2^63 − 1: none), ``[K, V]``."""
    from ..kernels.layer_nonfinite import layer_nonfinite_kernel

    shape = (layer.num_tensors, layer.num_operands)
    counts = memory.zeros(shape, "int64")
    firsts = memory.zeros(shape, "int64") + np.iinfo(np.int64).max
    for group in groups_of(layer):
        parameters = launch.merge_launch(group.dtypes, group.dtypes[0])
        tables = upload(memory, group, parameters.block_numel)
        with memory.current():
            layer_nonfinite_kernel[(tables.num_programs,)](
                tables.records,
                tables.entries,
                tables.tiles_per_entry,
                counts,
                firsts,
                DTYPES=group.dtypes,
                ALIGNMENT=group.alignment,
                BLOCK=parameters.block_numel,
                num_warps=parameters.num_threads // memory.warp_size,
                enable_fp_fusion=False,
            )
    return counts, firsts
