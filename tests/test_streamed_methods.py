"""Merges of files by methods that prune, or work by rows and columns, through a fake device: the CPU's bytes."""

from __future__ import annotations

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast import recipe
from metagpt_fast.backends import streamed_threshold, streaming
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.errors import BackendError, DataError
from metagpt_fast.methods import METHODS, SparseMethod

from .checkpoints import random_states, tensor_bytes, write_family
from .fake_device import fake
from .test_every_method import NUM_MODELS, SETTINGS, case_id
from .tools import cxx_compiler

__all__ = ["fake"]  # a fixture

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")

# A matrix, a tensor of several spans and one that is a single row, a vector, a scalar, an empty tensor.
SHAPES = {
    "layers.0.a.weight": (300, 7),
    "layers.0.large": (1500, 401),
    "layers.0.row": (9001,),
    "layers.1.norm": (33,),
    "scale": (),
    "none": (0, 4),
    "head": (51, 40),
}
DTYPES = [(BF16, BF16, F32, F64), (BF16,), (F16, F32), (F32, F16, BF16)]
SPARSE = [name for name, method in METHODS.items() if issubclass(method, SparseMethod)]
CASES = [
    *((name, SETTINGS.get(name, {}), {}) for name in SPARSE),
    ("ties", {"density": 0.4, "coefficients": "metagpt"}, {"granularity": "layer"}),
    ("arcee_fusion", {}, {"memory": "8MiB", "io": "pread"}),
    ("breadcrumbs", SETTINGS["breadcrumbs"], {"memory": "8MiB"}),
    ("sce", SETTINGS["sce"], {"granularity": "tensor", "io": "pread"}),
    ("della", SETTINGS["della"], {"memory": "8MiB", "dtype": "f32"}),
    ("model_stock", {"filter_wise": True}, {}),
    ("nuslerp", {"nuslerp_flatten": False, "weight": 0.5}, {}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": (0.3, 0.9)}, {"io": "pread"}),
    ("dare_ties", SETTINGS["dare_ties"], {"io": "pread", "memory": "8MiB"}),
]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(streaming, "_SLICE_NBYTES", 1)
    monkeypatch.setattr(streamed_threshold, "_LEAST_COUNTED", 2000)
    monkeypatch.setattr(recipe, "MIN_MEMORY_NBYTES", 1)  # a window that the largest tensor does not fit


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    states = random_states(31, DTYPES, SHAPES)
    return write_family(tmp_path_factory.mktemp("family"), states, num_shards=2, misalignment=3)


@pytest.mark.parametrize(("method", "parameters", "settings"), CASES, ids=case_id)
def test_merges_have_the_cpus_bytes(family, fake, tmp_path, method, parameters, settings):
    base, models = family
    arguments = {"method": method, "parameters": parameters, **settings}
    models = models[: NUM_MODELS.get(method, len(models))]
    cpu = mf.merge(base, models, tmp_path / "cpu", **arguments)
    report = mf.merge(base, models, tmp_path / "cuda", device="cuda", device_memory="48MiB", **arguments)
    assert tensor_bytes(tmp_path / "cuda") == tensor_bytes(tmp_path / "cpu")
    assert np.array_equal(report.coefficients, cpu.coefficients, equal_nan=True)
    assert (report.backend, report.device, report.device_reason) == ("cuda", "fake:0", "asked for")
    (device,) = fake
    assert device.num_launches > 0
    assert device.is_closed
    assert device.peak_nbytes <= 49 << 20  # and Gram matrices, those of columns among them


def test_nan_is_named(fake, tmp_path):
    states = random_states(32, DTYPES, SHAPES)
    states[1]["layers.0.large"].raw[1_000_000:1_000_002] = 0xFF
    base, models = write_family(tmp_path / "in", states)
    for method in ("ties", "dare_linear"):
        with pytest.raises(DataError, match=r"layers\.0\.large.* holds NaN or Inf.* index 500000"):
            mf.merge(base, models, tmp_path / "out", device="cuda", device_memory="48MiB", method=method)
    assert not (tmp_path / "out").exists()
    assert [device.is_closed for device in fake] == [True, True]


def test_a_merge_with_too_little_device_memory(family, fake, tmp_path):
    base, models = family
    with pytest.raises(BackendError, match="too little device memory"):
        mf.merge(base, models, tmp_path / "out", device="cuda", device_memory="1MiB", method="ties")
    assert not (tmp_path / "out").exists()
    assert fake[0].is_closed
