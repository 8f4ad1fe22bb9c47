"""The CUDA kernels on the host: the texts of csrc/cuda, compiled with tests/cpp/cuda_emulation.h."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metagpt_fast.backends.launch_tables import DeviceTable, Launch, pack
from metagpt_fast.backends.sparse_tables import SectionedLaunch

from .arrays import FloatArray
from .kernel_calls import BufferLayer, HasAddress
from .tools import cxx_compiler, run_checked


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="metagpt_fast-emulation-")


@functools.cache
def emulated_kernels() -> ctypes.CDLL:
    """Compile and load them, once."""
    compiler = cxx_compiler()
    assert compiler is not None
    library = Path(_folder().name) / "emulated.so"
    run_checked(
        [
            compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
            "-Icsrc", "-Itests/cpp", "-shared", "-fPIC", "-o", library, "tests/cpp/cuda_emulation.cpp",
        ]
    )  # fmt: skip
    return ctypes.CDLL(str(library))


class EmulatedCompute:
    """The CUDA kernels as a fake device takes them."""

    def layer_gram(self, launch: Launch, scratch: int, gram: int) -> None:
        emulated_kernels().emulated_layer_gram(
            ctypes.c_uint64(launch.table_address),
            ctypes.c_int64(launch.num_tensors),
            launch.num_operands,
            int(launch.has_base),
            ctypes.c_int64(launch.num_blocks),
            ctypes.c_int64(launch.num_spans),
            launch.kinds,
            ctypes.c_void_p(scratch),
            ctypes.c_void_p(gram),
        )

    def layer_merge(self, launch: Launch, num_nonfinite: int) -> None:
        emulated_kernels().emulated_layer_merge(
            ctypes.c_uint64(launch.table_address),
            ctypes.c_int64(launch.num_tensors),
            launch.num_operands,
            int(launch.has_base),
            ctypes.c_int64(launch.num_blocks),
            launch.kinds,
            ctypes.c_void_p(num_nonfinite),
        )

    def count_keys(self, launch: SectionedLaunch, what: int, counts: int) -> None:
        (wanted,) = launch.sections
        emulated_kernels().emulated_count_keys(
            *_sparse_table(launch), what, ctypes.c_uint64(wanted), launch.key_kind, launch.num_keys, launch.num_ranks,
            ctypes.c_void_p(counts),
        )  # fmt: skip

    def layer_moments(self, launch: SectionedLaunch, scratch: int, moments: int) -> None:
        (masks,) = launch.sections
        emulated_kernels().emulated_layer_moments(
            *_sparse_table(launch), ctypes.c_int64(launch.num_spans), ctypes.c_uint64(masks), launch.key_kind,
            ctypes.c_void_p(scratch), ctypes.c_void_p(moments),
        )  # fmt: skip

    def layer_elect(self, launch: SectionedLaunch, num_nonfinite: int) -> None:
        masks, election = launch.sections
        emulated_kernels().emulated_layer_elect(
            *_sparse_table(launch), ctypes.c_uint64(masks), launch.key_kind, ctypes.c_uint64(election),
            ctypes.c_void_p(num_nonfinite),
        )  # fmt: skip

    def ranked_masks(self, launch: SectionedLaunch, scratch: int) -> None:
        masks, ranks = launch.sections
        emulated_kernels().emulated_ranked_masks(
            *_sparse_table(launch), ctypes.c_uint64(masks), launch.key_kind, ctypes.c_uint64(ranks),
            ctypes.c_int64(launch.num_rows), ctypes.c_int64(launch.num_items), ctypes.c_void_p(scratch),
        )  # fmt: skip

    def column_gram(self, launch: SectionedLaunch, gram: int, open_sums: int) -> None:
        (matrices,) = launch.sections
        emulated_kernels().emulated_column_gram(
            *_sparse_table(launch)[:3], int(launch.has_base), ctypes.c_uint64(matrices),
            ctypes.c_int64(launch.num_sums), ctypes.c_void_p(gram), ctypes.c_void_p(open_sums),
        )  # fmt: skip

    def column_merge(self, launch: SectionedLaunch, coefficients: int, num_nonfinite: int) -> None:
        (matrices,) = launch.sections
        emulated_kernels().emulated_column_merge(
            *_sparse_table(launch)[:3], int(launch.has_base), ctypes.c_uint64(matrices),
            ctypes.c_int64(launch.num_blocks), ctypes.c_void_p(coefficients), ctypes.c_void_p(num_nonfinite),
        )  # fmt: skip


def _sparse_table(launch: SectionedLaunch) -> tuple[object, ...]:
    table, num_tensors = ctypes.c_uint64(launch.table_address), ctypes.c_int64(launch.num_tensors)
    return table, num_tensors, launch.num_operands, ctypes.c_int64(launch.num_blocks)


def gram(layer: BufferLayer, has_base: bool = True, *, into: FloatArray | None = None) -> FloatArray:
    """Return the layer's Gram matrices by the emulated kernels, added to ``into`` if that is given."""
    num_operands = len(layer[0])
    sums = np.zeros((len(layer), num_operands, num_operands)) if into is None else into
    launch, packed = _launch(layer, None, None, has_base)
    scratch = np.full((launch.num_blocks + launch.num_spans) * num_operands * (num_operands + 1) // 2, np.nan)
    EmulatedCompute().layer_gram(launch, scratch.ctypes.data, sums.ctypes.data)
    del packed
    return sums


def merge(
    layer: BufferLayer, coefficients: FloatArray, out: Sequence[HasAddress], has_base: bool = True
) -> NDArray[np.int64]:
    """Write the merged tensors into ``out`` by the emulated kernels; return how many elements are not finite."""
    counts = np.zeros(len(layer), np.int64)
    launch, packed = _launch(layer, coefficients, out, has_base)
    EmulatedCompute().layer_merge(launch, counts.ctypes.data)
    del packed
    return counts


def kinds(layer: BufferLayer, out: Sequence[HasAddress] | None = None, has_base: bool = True) -> set[int]:
    """Return which kinds of tensors the layer has."""
    launch, _ = _launch(layer, None, out, has_base)
    return {kind for kind in range(5) if launch.kinds >> kind & 1}


def _launch(
    layer: BufferLayer, coefficients: FloatArray | None, out: Sequence[HasAddress] | None, has_base: bool
) -> tuple[Launch, NDArray[np.uint8]]:
    """Return a launch, and the table that it reads."""
    num_tensors, num_operands = len(layer), len(layer[0])
    outputs = [] if out is None else out
    table = DeviceTable(
        addresses=np.array([[buffer.address for buffer in tensor] for tensor in layer], np.uint64),
        dtypes=np.array([[buffer.dtype.code for buffer in tensor] for tensor in layer], np.uint8),
        numels=np.array([tensor[0].numel for tensor in layer], np.int64),
        has_base=has_base,
        rows=np.arange(num_tensors),
        out_addresses=np.array([buffer.address for buffer in outputs] or [0] * num_tensors, np.uint64),
        out_dtypes=np.array([buffer.dtype.code for buffer in outputs] or [0] * num_tensors, np.uint8),
        coefficients=np.zeros((num_tensors, num_operands - has_base)) if coefficients is None else coefficients,
    )
    packed, num_blocks, num_spans, present = pack(table, merges=out is not None)
    memory = np.empty(packed.size + 16, np.uint8)
    packed_at = memory[-memory.ctypes.data % 16 :][: packed.size]
    packed_at[:] = packed
    place = (packed_at.ctypes.data, packed.size)
    return Launch(place[0], num_tensors, num_operands, has_base, num_blocks, num_spans, present, place), packed_at
