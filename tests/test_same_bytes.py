"""What must not change the output: threads, instruction set, way of reading, memory, backend, file layout."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, F16, F32, F64

from .checkpoints import integers, random_states, tensor_bytes, write_family
from .kernel_calls import kernels

# Pieces of a tensor are multiples of 262144 elements, so this one has four in a small window.
SHAPES = {"layers.0.a": (300, 7), "layers.0.large": (800_003,), "layers.1.b": (64, 65), "scale": (), "head": (51, 40)}
DTYPES = [(BF16, BF16, F32, F64), (BF16,), (F16, F32), (F32, F16, BF16)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    states = random_states(21, DTYPES, SHAPES)
    for state in states:
        state["ids"] = integers([1, 2, 3])
    return write_family(tmp_path_factory.mktemp("family"), states, num_shards=2, misalignment=5)


@pytest.fixture(scope="module", params=["model", "layer", "tensor"])
def merged(family, tmp_path_factory, request):
    """Inputs, granularity, and the output's tensors with one thread and all in one batch."""
    base, models = family
    out = tmp_path_factory.mktemp("merged") / "out"
    mf.merge(base, models, out, granularity=request.param, threads=1)
    return base, models, request.param, tensor_bytes(out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threads": 2},
        {"threads": 7},
        {"io": "pread"},
        {"io": "pread", "threads": 3, "memory": "64MiB"},
        {"memory": 64 << 20},
        {"max_shard_size": "100KB"},
        {"backend": "cpu", "dtype": "keep", "method": "metagpt", "exponent": 2},
    ],
    ids=str,
)
def test_settings(merged, tmp_path, settings):
    base, models, granularity, expected = merged
    report = mf.merge(base, models, tmp_path / "out", granularity=granularity, **settings)
    assert report.io == settings.get("io", "mmap")
    assert tensor_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("isa", mf.supported_isas())
def test_instruction_sets(merged, tmp_path, isa):
    base, models, granularity, expected = merged
    with kernels(isa=isa):
        report = mf.merge(base, models, tmp_path / "out", granularity=granularity)
    assert report.isa == isa
    assert tensor_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("window_nbytes", [1, 50_000, 3_000_000, 6_000_000])
def test_windows(merged, tmp_path, monkeypatch, window_nbytes, io):
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: window_nbytes)
    base, models, granularity, expected = merged
    mf.merge(base, models, tmp_path / "out", granularity=granularity, io=io)
    assert tensor_bytes(tmp_path / "out") == expected


def test_layout_of_the_inputs(merged, tmp_path):
    _, _, granularity, expected = merged
    states = random_states(21, DTYPES, SHAPES)
    for state in states:
        state["ids"] = integers([1, 2, 3])
    base, models = write_family(tmp_path / "in", states, num_shards=3, misalignment=2, is_reversed=True)
    mf.merge(base, models, tmp_path / "out", granularity=granularity)
    assert tensor_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    "settings", [{"method": "task_arithmetic"}, {"method": "linear", "coefficients": (3, 1, 2)}], ids=str
)
def test_backends_given_the_coefficients(family, tmp_path, settings, io):
    base, models = family
    for backend in ("cpu", "reference"):
        report = mf.merge(base, models, tmp_path / backend, backend=backend, io=io, **settings)
        assert report.backend == backend
    assert tensor_bytes(tmp_path / "cpu") == tensor_bytes(tmp_path / "reference")


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_backends_measure_the_same(family, io):
    base, models = family
    cpu, reference = (mf.measure(base, models, backend=name, io=io) for name in ("cpu", "reference"))
    scale = np.sqrt(np.einsum("kii,kjj->kij", cpu.gram, cpu.gram))
    assert np.all(np.abs(cpu.gram - reference.gram) <= 1e-6 * scale)


@pytest.mark.parametrize("variables", [{"METAGPT_FAST_ISA": "scalar"}, {"METAGPT_FAST_THREADS": "3"}], ids=str)
def test_environment_variables(merged, tmp_path, variables):
    base, models, granularity, expected = merged
    command = [sys.executable, "-m", "metagpt_fast", "merge", base, *models, "-o", tmp_path / "out"]
    subprocess.run(
        [*command, "--granularity", granularity, "--quiet"],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    assert tensor_bytes(tmp_path / "out") == expected


def test_linear_does_not_depend_on_the_bases_values(family, tmp_path):
    base, models = family
    states = random_states(99, DTYPES, SHAPES)
    states[0]["ids"] = integers([1, 2, 3])
    other, _ = write_family(tmp_path / "other", states[:1])
    for number, path in enumerate((base, other)):
        mf.merge(path, models, tmp_path / str(number), method="linear")
    assert tensor_bytes(tmp_path / "0") == tensor_bytes(tmp_path / "1")
