"""Every Triton kernel as it is launched: types of its arguments, its constants, and how much a thread loads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metagpt_fast.dtypes import F64
from metagpt_fast.kernels import (
    column_merge,
    launch,
    layer_elect,
    layer_fused,
    layer_gram,
    layer_merge,
    layer_moments,
    layer_nonfinite,
    layer_threshold,
    ranked_mask,
    widen,
)

from .triton_compiler import TARGETS, Compiled, compile_kernel

TILES = {"records_ptr": "*i64", "entries_ptr": "*i64", "tiles_per_entry": "i32"}
KEYS = {**TILES, "lines_ptr": "*i64"}
PARTIALS = {"partials_ptr": "*fp64", "num_programs": "i32"}
BAND, RANDOM = 1, 2
VARIANCE = 1


@dataclass(frozen=True)
class Case:
    """A kernel, compiled for operands of some dtypes at multiples of 16 bytes.

    Attributes:
        kernel: what ``triton.jit`` made.
        signature: types of its arguments.
        constants: its constants.
        num_threads: threads of a program.
        load_nbytes: bytes of weights that a thread loads per tile, all of them by 16; None where it does not matter.
        store_nbytes: bytes that it stores.
        fuses: whether products and sums may be fused.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_threads: int
    load_nbytes: int | None = None
    store_nbytes: int = 0
    fuses: bool = False

    def compile(self, target: str) -> Compiled:
        """Return the kernel compiled for a key of TARGETS."""
        num_warps = max(1, self.num_threads // TARGETS[target].warp_size)
        return compile_kernel(self.kernel, self.signature, self.constants, target, num_warps, fuses=self.fuses)


Codes = tuple[int, ...]


def nbytes_per_thread(parameters: launch.Launch, codes: Codes) -> int:
    """Return the bytes of one tile of operands of these dtypes, per thread."""
    return parameters.block_numel // parameters.num_threads * sum(launch.ITEMSIZES[code] for code in codes)


def gram(codes: Codes, alignment: int = launch.VECTOR) -> Case:
    parameters = launch.gram_launch(codes)
    return Case(
        layer_gram.layer_gram_kernel,
        {**TILES, **PARTIALS, "doubtful_ptr": "*i32"},
        {
            "DTYPES": codes,
            "HAS_BASE": True,
            "ALIGNMENT": alignment,
            "BLOCK": parameters.block_numel,
            "LANES": parameters.num_threads,
            "RUN": parameters.run_numel,
            "PAIRS": launch.power_of_two(launch.num_pairs(len(codes))),
        },
        parameters.num_threads,
        nbytes_per_thread(parameters, codes),
        fuses=True,
    )


def gram_wide(codes: Codes) -> Case:
    parameters = launch.wide_gram_launch(codes)
    return Case(
        layer_gram.layer_gram_wide_kernel,
        {**TILES, **PARTIALS, "doubtful_ptr": "*i32"},
        {
            "DTYPES": codes,
            "HAS_BASE": True,
            "ALIGNMENT": launch.VECTOR,
            "BLOCK": parameters.block_numel,
            "CHUNK": parameters.chunk_numel,
            "LANES": parameters.num_threads,
            "RUN": parameters.run_numel,
            "PAIRS": launch.power_of_two(launch.num_pairs(len(codes))),
            "EVERY": F64.code in codes,
        },
        parameters.num_threads,
        fuses=True,
    )


def gram_reduce(codes: Codes) -> Case:
    size = len(codes)
    return Case(
        layer_gram.layer_gram_reduce_kernel,
        {
            "records_ptr": "*i64",
            "first_programs_ptr": "*i64",
            **PARTIALS,
            "targets_ptr": "*i64",
            "gram_ptr": "*fp64",
        },
        {"STRIDE": size + 3, "MATRIX": size * size, "WIDTH": 4096},
        256,
    )


def merge(codes: Codes, alignment: int = launch.VECTOR, out_code: int | None = None) -> Case:
    out_code = codes[0] if out_code is None else out_code
    parameters = launch.merge_launch(codes, out_code)
    return Case(
        layer_merge.layer_merge_kernel,
        {**TILES, "coefficients_ptr": "*fp64", "gram_ptr": "*fp64", "nonfinite_ptr": "*i64"},
        {
            "DTYPES": codes,
            "OUT_DTYPE": out_code,
            "HAS_BASE": True,
            "KEEPS": True,
            "WIDE": F64.code in (*codes, out_code),
            "ALIGNMENT": alignment,
            "BLOCK": parameters.block_numel,
        },
        parameters.num_threads,
        nbytes_per_thread(parameters, codes),
        nbytes_per_thread(parameters, (out_code,)),
    )


def share(codes: Codes) -> Case:
    return Case(
        layer_fused.share_of_squares_kernel,
        {
            "gram_ptr": "*fp64",
            "members_ptr": "*i64",
            "first_members_ptr": "*i64",
            "exponent_ptr": "*fp64",
            "coefficients_ptr": "*fp64",
        },
        {
            "HAS_BASE": True,
            "NUM_MODELS": len(codes) - 1,
            "MODELS": launch.power_of_two(len(codes) - 1),
            "WIDTH": 64,
        },
        32,
    )


def columns(codes: Codes) -> Case:
    parameters = launch.merge_launch(codes, codes[0])
    return Case(
        column_merge.column_merge_kernel,
        {**TILES, "lines_ptr": "*i64", "nonfinite_ptr": "*i64"},
        {
            "DTYPES": codes,
            "OUT_DTYPE": codes[0],
            "HAS_BASE": True,
            "WIDE": F64.code in codes,
            "ALIGNMENT": launch.VECTOR,
            "BLOCK": parameters.block_numel,
        },
        parameters.num_threads,
    )


def of_tiles(kernel: Any, codes: Codes, **signature: str) -> Case:
    parameters = launch.merge_launch(codes, codes[0])
    constants = {"DTYPES": codes, "ALIGNMENT": launch.VECTOR, "BLOCK": parameters.block_numel}
    return Case(kernel, {**TILES, **signature}, constants, parameters.num_threads)


def sparse(kernel: Any, codes: Codes, signature: Mapping[str, str], **constants: Any) -> Case:
    parameters = launch.sparse_launch(codes)
    common = {
        "DTYPES": codes,
        "KEY_KIND": 0,
        "WIDE": F64.code in codes,
        "ALIGNMENT": launch.VECTOR,
        "BLOCK": parameters.block_numel,
    }
    loads_once = {"KINDS", "OUT_DTYPE"} & constants.keys()
    loaded = nbytes_per_thread(parameters, codes) if loads_once else None
    return Case(kernel, {**KEYS, **signature}, {**common, **constants}, parameters.num_threads, loaded)


def histogram(codes: Codes) -> Case:
    signature = {"states_ptr": "*i64", "histograms_ptr": "*i64", "shift": "i32"}
    kernel = layer_threshold.layer_threshold_histogram_kernel
    return sparse(kernel, codes, signature, NUM_KEYS=len(codes) - 1, NUM_RANKS=1)


def step(codes: Codes) -> Case:
    signature = {"states_ptr": "*i64", "histograms_ptr": "*i64"}
    return Case(layer_threshold.layer_threshold_step_kernel, signature, {}, 128)


def ties(codes: Codes) -> Case:
    signature = {"states_ptr": "*i64", "ties_ptr": "*i32", "num_programs": "i32"}
    kernel = layer_threshold.layer_threshold_ties_kernel
    return sparse(kernel, codes, signature, NUM_KEYS=len(codes) - 1, NUM_RANKS=1)


def index(codes: Codes) -> Case:
    signature = {
        "first_programs_ptr": "*i64",
        "states_ptr": "*i64",
        "ties_ptr": "*i32",
        "num_programs": "i32",
        "indices_ptr": "*i64",
    }
    kernel = layer_threshold.layer_threshold_index_kernel
    return sparse(kernel, codes, signature, NUM_KEYS=len(codes) - 1, NUM_RANKS=1, WIDTH=1024)


def count_nonzero(codes: Codes) -> Case:
    kernel = layer_threshold.layer_count_nonzero_kernel
    return sparse(kernel, codes, {"counts_ptr": "*i64"}, NUM_KEYS=len(codes) - 1)


def sparse_keys(codes: Codes, key_kind: int = 0) -> Case:
    return sparse(layer_threshold.layer_keys_kernel, codes, {"keys_ptr": "*i32"}, MODEL=0, KEY_KIND=key_kind)


def moments(codes: Codes, kind: int = BAND) -> Case:
    signature = {"fields_ptr": "*i64", **PARTIALS}
    return sparse(layer_moments.layer_moments_kernel, codes, signature, KINDS=(kind,) * (len(codes) - 1))


def elect(codes: Codes, kind: int = BAND) -> Case:
    signature = {"fields_ptr": "*i64", "elections_ptr": "*fp64", "rules_ptr": "*fp64", "nonfinite_ptr": "*i64"}
    constants = {"OUT_DTYPE": codes[0], "KINDS": (kind,) * (len(codes) - 1)}
    return sparse(layer_elect.layer_elect_kernel, codes, signature, **constants)


def ranked(codes: Codes) -> Case:
    signature = {
        "order_ptr": "*i64",
        "probabilities_ptr": "*i64",
        "stream_ptr": "*i64",
        "mask_ptr": "*u8",
        "first": "i64",
        "numel": "i64",
        "C": "i64",
    }
    return Case(ranked_mask.ranked_mask_kernel, signature, {"BLOCK": 1024}, 128)


Builder = Callable[[Codes], Case]
BUILDERS: dict[str, Builder] = {
    "layer_gram": gram,
    "layer_gram_wide": gram_wide,
    "layer_gram_reduce": gram_reduce,
    "layer_merge": merge,
    "share_of_squares": share,
    "column_merge": columns,
    "layer_nonfinite": functools.partial(
        of_tiles, layer_nonfinite.layer_nonfinite_kernel, counts_ptr="*i64", firsts_ptr="*i64"
    ),
    "widen": functools.partial(of_tiles, widen.widen_kernel, out_ptr="*fp64"),
    "layer_threshold_histogram": histogram,
    "layer_threshold_step": step,
    "layer_threshold_ties": ties,
    "layer_threshold_index": index,
    "layer_count_nonzero": count_nonzero,
    "layer_keys": sparse_keys,
    "layer_moments": moments,
    "layer_elect": elect,
    "layer_elect_random": functools.partial(elect, kind=RANDOM),
    "ranked_mask": ranked,
}
