"""Which backend takes tensors on which device, and what is refused; no GPU is needed for that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metagpt_fast as mf
from metagpt_fast import info, ops
from metagpt_fast.array_views import view
from metagpt_fast.backends import make_backend
from metagpt_fast.dtypes import BF16

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class OnGpu:
    """What is looked at of a torch tensor on a GPU."""

    is_cuda = True
    requires_grad = False
    layout = torch.strided
    __dlpack__ = None

    def __init__(self, shape=(2, 3), *, device="cuda:0", dtype=torch.bfloat16, address=4096, contiguous=True):
        self.shape, self.device, self.dtype = torch.Size(shape), torch.device(device), dtype
        self._address, self._is_contiguous = address, contiguous

    def data_ptr(self):
        return self._address

    def is_contiguous(self):
        return self._is_contiguous

    def numel(self):
        return self.shape.numel()


def test_view_of_a_tensor_on_a_gpu():
    seen = view(OnGpu(device="cuda:1"), "base[0]")
    assert (seen.address, seen.dtype, seen.shape, seen.device) == (4096, BF16, (2, 3), "cuda:1")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (OnGpu(dtype=torch.int32), "dtype"),
        (OnGpu(contiguous=False), "not contiguous"),
        (OnGpu(address=0), "no memory of its own"),
    ],
)
def test_tensors_that_are_refused(tensor, message):
    with pytest.raises(mf.RecipeError, match=message):
        view(tensor, "base[0]")


def test_one_device_per_call():
    with pytest.raises(mf.RecipeError, match=r"several devices") as caught:
        ops.layer_gram([OnGpu()], [[OnGpu(device="cuda:1")]])
    assert (caught.value.where, caught.value.got) == ("models[0][0]", "cuda:1")
    with pytest.raises(mf.RecipeError, match=r"several devices"):
        ops.layer_gram([np.ones((2, 3), np.float32)], [[OnGpu()]])
    with pytest.raises(mf.RecipeError, match=r"several devices"):
        mf.merge_state_dicts({"a": np.ones((2, 3), np.float32)}, [{"a": OnGpu()}])
    ones = {"a": np.ones((2, 3), np.float32)}
    with pytest.raises(mf.RecipeError, match=r"several devices"):
        mf.merge_state_dicts(ones, [ones], out={"a": OnGpu()})
    with pytest.raises(mf.RecipeError, match=r"several devices"):
        ops.layer_merge([ones["a"]], [[ones["a"]]], [1.0], [OnGpu()])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kernels_of_the_cpu_do_not_take_tensors_on_a_gpu(backend):
    with pytest.raises(mf.BackendError, match="does not reach") as caught:
        ops.layer_gram([OnGpu()], [[OnGpu()]], backend=backend)
    assert "auto, triton" in str(caught.value)


@needs_no_gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_reason_why_triton_cannot_run_is_named(backend):
    with pytest.raises(mf.BackendError, match=r"without CUDA|no GPU|not installed"):
        ops.layer_merge([OnGpu()], [[OnGpu()]], [1.0], backend=backend)


@needs_no_gpu
def test_triton_does_not_take_tensors_on_the_cpu():
    with pytest.raises(mf.BackendError):
        ops.layer_gram([np.ones(3, np.float32)], [[np.ones(3, np.float32)]], backend="triton")


def test_triton_does_not_take_files():
    with pytest.raises(mf.BackendError, match="not files") as caught:
        make_backend("triton")
    assert "merge_state_dicts" in str(caught.value)
    with pytest.raises(mf.BackendError, match="unknown"):
        make_backend("cuda")


def test_the_cpu_is_chosen_for_what_is_not_on_a_gpu():
    assert make_backend().name == make_backend("auto", "cpu").name == "cpu"


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "gpus", "says"),
    [
        (None, None, "no NVIDIA driver was found", "torch and triton not installed"),
        ("2.13.0", None, [], "triton not installed"),
        ("2.13.0+cpu", "3.9.0", [{"name": "H100"}], "built without CUDA"),
        ("2.13.0+rocm7", "3.9.0", "no NVIDIA driver was found", "ROCm"),
        ("2.13.0", "3.9.0", "no NVIDIA driver was found", "no NVIDIA driver"),
        ("2.13.0", "3.9.0", [{"name": "H100"}], "available for tensors on a GPU"),
    ],
)
def test_info_says_whether_tensors_on_a_gpu_can_be_merged(monkeypatch, torch_version, triton_version, gpus, says):
    versions = {"torch": torch_version, "triton": triton_version}
    monkeypatch.setattr(info, "_versions", lambda: versions)
    monkeypatch.setattr(info, "_gpus", lambda: (gpus, "not looked at"))
    assert says in info.collect()["backends"]["triton"]
