"""bench/gpu.py without a GPU: it says so. What it measures with, on the fake device, with a clock that stands still."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.cuda_device import list_devices
from metagpt_fast.errors import BackendError

from .fake_device import CpuCompute, FakeDevice
from .tools import ROOT, cxx_compiler, run

sys.path.append(str(ROOT / "bench"))

from benchlib import gpu_sparse, gpu_streaming, gpu_torch
from benchlib.gpu_kernels import measure_kernels
from benchlib.rows import Row

from metagpt_fast.benchmarking.arrays import DTYPES, make_layer_arrays


class TimedFake(FakeDevice):
    """Every pair of events is a millisecond apart; copies within the device run."""

    def make_event(self, *, is_timed=False):
        return super().make_event()

    def seconds_between(self, first, second):
        return 1e-3

    def copy_to_device(self, stream, to, source, nbytes):
        # 256 bytes of an array are for its alignment: what lies behind may be another's.
        if any(start <= source < start + array.size - 256 for start, array in self._memory.items()):
            self._pinned, pinned = self._memory, self._pinned
            try:
                super().copy_to_device(stream, to, source, nbytes)
            finally:
                self._pinned = pinned
            return
        super().copy_to_device(stream, to, source, nbytes)


class WrongCompute(CpuCompute):
    def layer_merge(self, launch, num_nonfinite):
        """Leaves the output as it was."""


def test_without_a_gpu_it_ends_politely():
    try:
        list_devices()
    except BackendError:
        finished = run([sys.executable, "bench/gpu.py"])
        assert finished.returncode == 1
        assert "gpu.py: there is nothing to measure on: " in finished.stdout or "no nvcc" in finished.stdout
        assert "Traceback" not in finished.stdout


@pytest.mark.parametrize("num_tensors", [1, 30])
def test_kernels(num_tensors):
    cases = [("bf16", 3, 30 * 4096 + 17, num_tensors), ("f32", 1, 30 * 4096 + 1, num_tensors)]
    rows, wrong = measure_kernels(TimedFake(), cases, 2, lambda layer: {("layer_gram", "speedup_torch"): [2e-3]})
    assert wrong == []
    assert [row.parameters["kernel"] for row in rows] == ["layer_gram", "layer_merge"] * 2
    assert rows[0].nbytes == 4 * 2 * (30 * 4096 + 17)
    assert rows[0].metrics["gb_per_s"].median == pytest.approx(rows[0].nbytes / 1e-3 / 1e9)
    assert rows[0].metrics["percent_of_ceiling"].median == pytest.approx(200)
    assert ("speedup_torch" in rows[0].metrics) == (num_tensors == 1)
    assert Row.from_dict(rows[0].to_dict()) == rows[0]


def test_a_wrong_result_is_reported():
    _, wrong = measure_kernels(TimedFake(0, WrongCompute()), [("bf16", 2, 9000, 1)], 1)
    assert wrong == ["the merged tensor of bf16, T = 2"]


def test_torch_is_given_the_same_work():
    torch = pytest.importorskip("torch")
    layer = make_layer_arrays(DTYPES["bf16"], 3, 5000)
    *inputs, out = (torch.from_numpy(array).view(torch.bfloat16) for array in layer.arrays)
    gram = gpu_torch._gram(inputs).numpy()
    CpuBackend().layer_gram(layer.table, layer.gram)
    assert np.allclose(gram, layer.gram[0], rtol=1e-4, atol=1e-6)
    gpu_torch._merge(inputs, [float(c) for c in layer.coefficients[0]], out)
    theirs = out.float().clone()
    CpuBackend().layer_merge(layer.table, layer.coefficients, layer.out_table)
    assert torch.allclose(theirs, out.float(), rtol=2**-7, atol=1e-6)


def test_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_streaming, "_BATCH_NBYTES", 8 << 20)
    device = TimedFake(1)
    rows, wrong = gpu_streaming.measure_streaming(device, tmp_path, 2_500_000, 64 << 20, 1)
    assert wrong == []
    assert [row.parameters["action"] for row in rows] == ["measure", "combine"]
    assert all(np.isfinite(row.metrics["percent_of_ceiling"].median) for row in rows)
    assert device.is_closed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")
def test_methods_that_prune_and_those_by_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_streaming, "_BATCH_NBYTES", 4 << 20)
    device = TimedFake(1)
    rows, wrong = gpu_sparse.measure_sparse(device, tmp_path, 70 * 4096, 64 << 20, 1)
    assert wrong == []
    assert [row.parameters["action"] for row in rows] == [
        "threshold", "threshold by importance", "moments", "elect", "moments by rank", "elect by rank",
        "column gram", "column merge",
    ]  # fmt: skip
    assert rows[0].nbytes == 3 * 4 * 2 * 70 * 4096
    assert all(np.isfinite(row.metrics["speedup_cpu"].median) for row in rows)
    assert device.is_closed
    assert list(tmp_path.iterdir()) == []
