"""What the GPU kernels are compared with: torch, eager and compiled, written with care; and the Triton kernels."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from metagpt_fast.benchmarking.arrays import LayerArrays

_CHUNK_NUMEL = 16 << 20  # float32 copies of all operands at this size: what eager torch needs beside the weights


def make_baselines(
    index: int, num_rounds: int, deadline: float, compiled: tuple[int, ...]
) -> Callable[[LayerArrays], dict[tuple[str, str], list[float]]]:
    """Return a function that measures torch, and Triton where that backend is there, on a layer's values.

    Args:
        index: number of the GPU.
        num_rounds: of each.
        deadline: by ``time.monotonic``; after it nothing more is compiled.
        compiled: for which numbers of models torch.compile is measured: each takes some ten seconds.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(index)

    def measure(layer: LayerArrays) -> dict[tuple[str, str], list[float]]:
        dtype = getattr(torch, layer.dtype.torch_name or "")
        tensors = [torch.from_numpy(array).view(dtype).cuda() for array in layer.arrays]
        *inputs, out = tensors
        coefficients = [float(c) for c in layer.coefficients[0]]
        works: dict[tuple[str, str], Callable[[], Any]] = {
            ("layer_gram", "speedup_torch"): lambda: _gram(inputs),
            ("layer_merge", "speedup_torch"): lambda: _merge(inputs, coefficients, out),
        }
        if layer.num_models in compiled and time.monotonic() < deadline:
            gram, merge = torch.compile(_gram_of_chunk), torch.compile(_merged_chunk)
            works["layer_gram", "speedup_torch_compile"] = lambda: _gram(inputs, gram)
            works["layer_merge", "speedup_torch_compile"] = lambda: _merge(inputs, coefficients, out, merge)
        works |= _triton_works(inputs, out, layer)
        return {key: _time(work, num_rounds) for key, work in works.items()}

    return measure


def _gram_of_chunk(chunks: list[Any]) -> Any:
    import torch

    base = chunks[0].float()
    v = torch.stack([base, *(chunk.float() - base for chunk in chunks[1:])])
    return v @ v.T


def _gram(inputs: list[Any], function: Callable[[list[Any]], Any] = _gram_of_chunk) -> Any:
    parts = zip(*(tensor.split(_CHUNK_NUMEL) for tensor in inputs), strict=True)
    return sum(function(list(chunks)).double() for chunks in parts)


def _merged_chunk(chunks: list[Any], coefficients: list[float], dtype: Any) -> Any:
    base = chunks[0].float()
    total = base
    for chunk, coefficient in zip(chunks[1:], coefficients, strict=True):
        total = total + coefficient * (chunk.float() - base)
    return total.to(dtype)


def _merge(
    inputs: list[Any], coefficients: list[float], out: Any, function: Callable[..., Any] = _merged_chunk
) -> None:
    outs = out.split(_CHUNK_NUMEL)
    parts = zip(*(tensor.split(_CHUNK_NUMEL) for tensor in inputs), strict=True)
    for target, chunks in zip(outs, parts, strict=True):
        target.copy_(function(list(chunks), coefficients, out.dtype))


def _triton_works(inputs: list[Any], out: Any, layer: LayerArrays) -> dict[tuple[str, str], Callable[[], Any]]:
    if importlib.util.find_spec("metagpt_fast.backends.triton") is None:
        return {}
    from metagpt_fast.backends.tables import MEMORY, layer_table, output_table
    from metagpt_fast.backends.triton import TritonBackend

    backend: Any = TritonBackend(str(inputs[0].device))
    code = layer.dtype.code
    assert code is not None
    table = layer_table([[(tensor.data_ptr(), MEMORY, code) for tensor in inputs]], [layer.numel], True)
    target = output_table([(out.data_ptr(), MEMORY, code)])
    coefficients = np.ascontiguousarray(layer.coefficients)
    return {
        ("layer_gram", "triton"): lambda: backend.gram_on_device(table),
        ("layer_merge", "triton"): lambda: backend.merge_on_device(table, coefficients, target),
    }


def _time(work: Callable[[], Any], num_rounds: int) -> list[float]:
    import torch

    work()
    work()
    seconds = []
    for _ in range(num_rounds):
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        second.record()
        second.synchronize()
        seconds.append(first.elapsed_time(second) / 1e3)
    return seconds
