"""What surrounds a kernel call must not change its bits: other threads, a fork, flush-to-zero."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from metagpt_fast import _native
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .arrays import Buffer, buffer_of, differing, encode, make_layer
from .kernel_calls import gram, kernels, merge


@pytest.fixture(params=_native.supported_isas())
def isa(request):
    with kernels(isa=request.param):
        yield request.param


@contextmanager
def flush_to_zero():
    """Treat subnormals as zero in this thread, as programs do that want speed (FTZ and DAZ)."""
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1.0), (F32, 1e-39), (BF16, 1e-39), (F16, 1e-6), (F64, 1e-160)])
def test_gram_under_flush_to_zero(isa, dtype, scale, num_threads):
    """Inputs are subnormal, but for F64: there the sums of squares are."""
    rng = np.random.default_rng(24)
    layer = [[buffer_of(encode(rng.normal(0.0, scale, n), dtype), dtype) for _ in range(3)] for n in (17, 600_011)]
    with kernels(num_threads=num_threads):
        expected = gram(layer)
        actual = np.zeros_like(expected)
        with flush_to_zero():
            gram(layer, into=actual)
    assert actual.tobytes() == expected.tobytes(), f"{isa=} {dtype} {scale=} {num_threads=}: {actual}, {expected}"
    assert np.all(expected != 0)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e-38), (BF16, 1e-38), (F16, 1e-6), (F64, 1e-308), (F32, 1.0)])
def test_merge_under_flush_to_zero(isa, dtype, scale, num_threads):
    rng = np.random.default_rng(35)
    coefficients = np.array([[0.3, 0.1]])
    layer = [[buffer_of(encode(rng.normal(0.0, scale, 300_000), dtype), dtype) for _ in range(3)]]
    actual, expected = Buffer(dtype, 300_000), Buffer(dtype, 300_000)
    with kernels(num_threads=num_threads):
        merge(layer, coefficients, [expected])
        with flush_to_zero():
            merge(layer, coefficients, [actual])
    wrong = differing(actual.raw, expected.raw, dtype)
    assert not wrong.size, f"{isa=} {dtype} {scale=} {num_threads=}: {wrong.size} differ"


def test_calls_from_several_threads_at_once(isa):
    layer = make_layer(np.random.default_rng(41), (BF16,) * 3, (600_011, 17), misalignments=(0, 1, 2))
    coefficients = np.full((2, 2), 0.3)
    expected = gram(layer)
    merged = [Buffer(BF16, tensor[0].numel) for tensor in layer]
    merge(layer, coefficients, merged)

    def compute(_):
        out = [Buffer(BF16, tensor[0].numel) for tensor in layer]
        merge(layer, coefficients, out)
        return gram(layer).tobytes(), *(buffer.raw.tobytes() for buffer in out)

    with kernels(num_threads=2), ThreadPoolExecutor(4) as pool:
        results = set(pool.map(compute, range(12)))
    assert results == {(expected.tobytes(), *(buffer.raw.tobytes() for buffer in merged))}


FORK = """
import os, sys
import numpy as np
from metagpt_fast import _native
data = np.random.default_rng(0).normal(size=(2, 600_011)).astype(np.float32)
def gram():
    result = np.zeros((1, 2, 2))
    _native.layer_gram(
        np.array([[row.ctypes.data for row in data]], np.uint64), np.full((1, 2), -1, np.int32),
        np.zeros((1, 2), np.uint8), np.array([data.shape[1]]), True, result)
    return result.tobytes()
_native.set_num_threads(2)
before = gram()
child = os.fork()
if child == 0:
    os._exit(0 if gram() == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_computes_too():
    """The pool's threads do not exist in the child, which must not wait for them."""
    finished = subprocess.run([sys.executable, "-c", FORK], timeout=30, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
