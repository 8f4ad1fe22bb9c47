"""--device: what is taken, the reason for it, and why not."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast import devices
from metagpt_fast.backends import cuda_device
from metagpt_fast.backends.sparse_tables import SectionedLaunch
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16
from metagpt_fast.errors import BackendError, RecipeError

from .checkpoints import random_states, write_family

SHAPES = {"layers.0.a": (30, 7), "head": (51, 40)}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    states = random_states(3, [(BF16,)] * 3, SHAPES)
    return write_family(tmp_path_factory.mktemp("family"), states)


class FakeModule:
    """What the compiled module says on machines that tests do not run on."""

    def __init__(self, found):
        self._found = found

    def devices(self):
        if isinstance(self._found, str):
            raise RuntimeError(self._found)
        return self._found

    def driver_version(self):
        return 13010

    def runtime_version(self):
        return 12080


def use_module(monkeypatch, found):
    monkeypatch.setattr(cuda_device, "load_module", lambda: FakeModule(found))


H100 = {"index": 0, "name": "NVIDIA H100", "compute_capability": "9.0", "memory_nbytes": 85 * 10**9}


def test_auto_is_the_cpu_and_says_why(family, tmp_path, monkeypatch):
    def refuse():
        raise AssertionError("nobody asked for a GPU")

    monkeypatch.setattr(cuda_device, "load_module", refuse)
    base, models = family
    report = mf.merge(base, models, tmp_path / "out")
    assert (report.device, report.device_reason) == ("cpu", "a merge from files is bound by reading them")
    facts = json.loads((tmp_path / "out" / "metagpt_fast.json").read_text())
    assert facts["device_reason"] == report.device_reason
    assert mf.merge(base, models, tmp_path / "two", device="cpu").device_reason == "asked for"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "ties"}, "methods that prune have not been measured on a GPU"),
        ({"method": "task_arithmetic"}, "a merge from files is bound by reading them"),
    ],
)
def test_auto_says_why_for_every_kind_of_method(family, tmp_path, settings, reason):
    base, models = family
    report = mf.merge(base, models, tmp_path / "out", **settings)
    assert report.device == "cpu"
    assert report.device_reason.startswith(reason)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "cuda:00000", 0])
def test_devices_that_are_none(family, tmp_path, device):
    base, models = family
    with pytest.raises(RecipeError, match="unknown device"):
        mf.merge(base, models, tmp_path / "out", device=device)
    result = CliRunner().invoke(cli, ["merge", str(base), str(models[0]), "-o", "x", "--device", str(device)])
    assert result.exit_code == 2
    assert "auto, cpu, cuda or cuda:N" in result.output


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("no NVIDIA driver was found", "no NVIDIA driver was found"),
        ("cudaGetDeviceCount: initialization error", "initialization error"),
        ([], "a CUDA driver that reports no devices"),
        ([H100], r"there is no such GPU: got cuda:1, expected cuda:0 \(NVIDIA H100\)"),
    ],
)
def test_a_gpu_that_is_not_there_is_an_error_with_the_reason(family, tmp_path, monkeypatch, found, reason):
    use_module(monkeypatch, found)
    base, models = family
    with pytest.raises(BackendError, match=reason):
        mf.merge(base, models, tmp_path / "out", device="cuda:1")
    with pytest.raises(BackendError, match=reason):
        mf.measure(base, models, device="cuda:1")
    assert not (tmp_path / "out").exists()


def test_an_installation_without_the_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "metagpt_fast._cuda", None)
    monkeypatch.delattr(mf, "_cuda", raising=False)
    with pytest.raises(BackendError, match=r"no CUDA kernels.* METAGPT_FAST_CUDA=ON"):
        cuda_device.list_devices()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "reference"}, "'reference' with --device cuda"),
        ({"backend": "cpu"}, "'cpu' with --device cuda"),
    ],
)
def test_what_a_gpu_does_not_do_is_refused_before_it_is_looked_for(family, tmp_path, monkeypatch, settings, reason):
    monkeypatch.setattr(devices, "_open_device", lambda index: pytest.fail("a device was opened"))
    base, models = family
    with pytest.raises(BackendError, match=reason):
        mf.merge(base, models, tmp_path / "out", device="cuda", **settings)
    assert not (tmp_path / "out").exists()


def test_info_says_what_there_is(monkeypatch):
    use_module(monkeypatch, [H100])
    shown = json.loads(CliRunner().invoke(cli, ["info", "--json"]).output)
    assert shown["gpus"] == [H100]
    assert shown["backends"]["cuda"] == "available (--device cuda; driver for CUDA 13.1, built with 12.8)"
    use_module(monkeypatch, "no NVIDIA driver was found")
    shown = json.loads(CliRunner().invoke(cli, ["info", "--json"]).output)
    assert "no NVIDIA driver was found" in shown["gpus"]
    assert shown["backends"]["cuda"].startswith("not available: ")


def test_memory_errors_of_the_driver_have_a_hint():
    device = cuda_device.CudaDevice.__new__(cuda_device.CudaDevice)
    device.name = "cuda:0 (H100)"

    def fail():
        raise RuntimeError("cudaMalloc: out of memory")

    with pytest.raises(BackendError, match=r"cuda:0 \(H100\): CUDA failed: got cudaMalloc.* smaller --device-memory"):
        device._call(fail)


def test_every_launch_reaches_the_driver():
    """Without a GPU a launch with arguments of the right number and types fails in CUDA, and nowhere before."""
    try:
        module = cuda_device.load_module()
    except BackendError:
        pytest.skip("no CUDA module")
    try:
        cuda_device.list_devices()
    except BackendError:
        device = cuda_device.CudaDevice.__new__(cuda_device.CudaDevice)
        device.name, device._module = "cuda:0", module
    else:
        pytest.skip("there is a GPU")
    facts = {"table_address": 256, "num_tensors": 1, "num_operands": 3, "has_base": True, "num_blocks": 1}
    facts |= {"num_spans": 1, "kinds": 1, "reads": (256, 100), "num_sums": 1, "num_rows": 1, "num_keys": 2}
    for name, sections, arguments in (
        ("layer_gram", (), (512, 512)),
        ("layer_merge", (), (512,)),
        ("count_keys", (512,), (0, 512)),
        ("count_keys", (512,), (3, 512)),
        ("layer_moments", (512,), (512, 512)),
        ("layer_elect", (512, 1024), (512,)),
        ("ranked_masks", (512, 1024), (512,)),
        ("column_gram", (512,), (512, 512)),
        ("column_merge", (512,), (512, 512)),
    ):
        launch = SectionedLaunch(**facts, sections=sections)
        with pytest.raises(BackendError, match=r"CUDA failed: got .*kernel<<<1, "):
            getattr(device, name)(0, launch, *arguments)
