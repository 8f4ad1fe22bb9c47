"""What a careful person would write without this project: NumPy and torch, in chunks, with fp32 accumulation.

In memory they are compared with the kernels. As a script, ``python bench/baselines.py BASE MODEL ... -o OUT`` is plain
torch doing task arithmetic from files to files: mapped inputs, output of full size from the start, no other library.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from metagpt_fast.benchmarking.arrays import LayerArrays, Raw
from metagpt_fast.dtypes import BF16, F16, DType

if TYPE_CHECKING:
    import torch

# Chunks of float32 that stay in the caches between the steps; the best of 2^14, 2^16 ... 2^22, for NumPy and for torch.
CHUNK_NUMEL = 1 << 18

FloatArray = NDArray[np.float64]


def numpy_gram(layer: LayerArrays) -> FloatArray:
    """Return the Gram matrix of [base, τ_1 ... τ_T]: fp32 within a chunk (BLAS), fp64 across chunks."""
    vectors = np.empty((1 + layer.num_models, CHUNK_NUMEL), np.float32)
    gram = np.zeros((len(vectors), len(vectors)))
    for start in range(0, layer.numel, CHUNK_NUMEL):
        v = vectors[:, : min(CHUNK_NUMEL, layer.numel - start)]
        for i, array in enumerate(layer.arrays[:-1]):
            _numpy_load(array, layer.dtype, start, v[i])
        v[1:] -= v[0]
        gram += v @ v.T
    return gram


def numpy_merge(layer: LayerArrays) -> None:
    """Write base + Σ c_t τ_t into the layer's output."""
    base, tau, total = np.empty((3, CHUNK_NUMEL), np.float32)
    coefficients = layer.coefficients[0].astype(np.float32)
    for start in range(0, layer.numel, CHUNK_NUMEL):
        n = min(CHUNK_NUMEL, layer.numel - start)
        _numpy_load(layer.arrays[0], layer.dtype, start, base[:n])
        total[:n] = base[:n]
        for array, coefficient in zip(layer.arrays[1:-1], coefficients, strict=True):
            _numpy_load(array, layer.dtype, start, tau[:n])
            tau[:n] -= base[:n]
            tau[:n] *= coefficient
            total[:n] += tau[:n]
        _numpy_store(total[:n], layer.arrays[-1], layer.dtype, start)


def _numpy_load(array: Raw, dtype: DType, start: int, out: NDArray[np.float32]) -> None:
    """Widen ``out.size`` elements from ``start``."""
    raw = array[start * dtype.itemsize : (start + out.size) * dtype.itemsize]
    if dtype is BF16:
        bits = out.view(np.uint32)
        bits[:] = raw.view(np.uint16)
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        out[:] = raw.view(np.float16 if dtype is F16 else np.float32)


def _numpy_store(values: NDArray[np.float32], array: Raw, dtype: DType, start: int) -> None:
    """Round finite values to the nearest, ties to even; destroys them."""
    out = array[start * dtype.itemsize : (start + values.size) * dtype.itemsize]
    if dtype is BF16:
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        np.right_shift(bits, np.uint32(16), out=bits)
        out.view(np.uint16)[:] = bits
    else:
        out.view(np.float16 if dtype is F16 else np.float32)[:] = values


def torch_gram(tensors: Sequence[torch.Tensor], threads: int) -> FloatArray:
    """Return the Gram matrix of [base, τ_1 ... τ_T] of flat tensors."""
    import torch

    def sum_part(part: slice) -> torch.Tensor:
        mine = [tensor[part] for tensor in tensors]
        vectors = torch.empty((len(mine), CHUNK_NUMEL))
        gram = torch.zeros((len(mine), len(mine)), dtype=torch.float64)
        for start in range(0, mine[0].numel(), CHUNK_NUMEL):
            v = vectors[:, : min(CHUNK_NUMEL, mine[0].numel() - start)]
            for i, tensor in enumerate(mine):
                v[i].copy_(tensor[start : start + CHUNK_NUMEL])
            v[1:].sub_(v[0])
            gram += v @ v.T
        return gram

    return np.asarray(sum(_in_parts(sum_part, tensors[0].numel(), threads)).numpy())


def torch_merge(tensors: Sequence[torch.Tensor], coefficients: Sequence[float], threads: int) -> None:
    """Write base + Σ c_t τ_t; ``tensors`` are base, models and output, all flat."""
    import torch

    def merge_part(part: slice) -> None:
        base, *models, out = (tensor[part] for tensor in tensors)
        buffers = torch.empty((3, min(CHUNK_NUMEL, base.numel())))
        for start in range(0, base.numel(), CHUNK_NUMEL):
            end = min(start + CHUNK_NUMEL, base.numel())
            origin, tau, total = buffers[:, : end - start]
            origin.copy_(base[start:end])
            total.copy_(origin)
            for model, coefficient in zip(models, coefficients, strict=True):
                tau.copy_(model[start:end]).sub_(origin)
                total.add_(tau, alpha=coefficient)
            out[start:end].copy_(total)

    _in_parts(merge_part, tensors[0].numel(), threads)


def _in_parts(work: Callable[[slice], Any], numel: int, threads: int) -> list[Any]:
    """Return ``work`` of as many equal parts of ``numel`` elements as threads.

    Threads of our own, because torch's wait for each other after every small step: ten times slower as soon as another
    process needs a core, and no faster otherwise.
    """
    import torch

    torch.set_num_threads(1)
    step = -(-numel // threads)
    parts = [slice(start, min(start + step, numel)) for start in range(0, numel, step)]
    if len(parts) == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(work, parts))


def torch_tensors(layer: LayerArrays) -> list[torch.Tensor]:
    """Return base, models and output as torch tensors on the same memory."""
    import torch

    dtype = getattr(torch, str(layer.dtype.torch_name))
    return [torch.from_numpy(array).view(dtype) for array in layer.arrays]


def _map_tensors(path: Path, *, writable: bool = False) -> dict[str, torch.Tensor]:
    """Return the flat bf16 tensors of a safetensors file, on its pages."""
    import torch

    with path.open("r+b" if writable else "rb") as file:
        # Copy-on-write: torch warns about read-only memory. Nothing is written to the inputs.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY)
    data_offset = 8 + int.from_bytes(mapped[:8], "little")
    tensors = {}
    for name, entry in json.loads(mapped[8:data_offset]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            count = (last - first) // 2
            tensors[name] = torch.frombuffer(mapped, dtype=torch.bfloat16, count=count, offset=data_offset + first)
    return tensors


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "out", required=True, type=click.Path(path_type=Path))
@click.option("--coefficient", default=0.3, show_default=True)
def main(base: Path, models: tuple[Path, ...], out: Path, coefficient: float) -> None:
    """Merge bf16 models that are sharded like BASE."""
    coefficients = [coefficient] * len(models)
    threads = len(os.sched_getaffinity(0))
    out.mkdir()
    for source in sorted(base.iterdir()):
        target = out / source.name
        if source.suffix != ".safetensors":
            shutil.copyfile(source, target)
            continue
        with source.open("rb") as file, target.open("wb") as copy:
            header_nbytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            copy.write(file.read(header_nbytes))
            os.posix_fallocate(copy.fileno(), 0, source.stat().st_size)
        files = [_map_tensors(folder / source.name) for folder in (base, *models)]
        files.append(_map_tensors(target, writable=True))
        for name in files[0]:
            torch_merge([file[name] for file in files], coefficients, threads)


if __name__ == "__main__":
    main()
