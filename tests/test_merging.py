"""merge() against the method in float64, over granularities, exponents, dtypes and layouts of the files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import metagpt_fast as mf
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.dtypes import BF16, F16, F32, F64, OUTPUT_DTYPES

from . import oracle
from .checkpoints import (
    SHAPES,
    integers,
    random_states,
    read_state,
    tensor_bytes,
    three_models,
    write_family,
    write_state,
)
from .checksum_oracle import check_checksums, slow_crc32c

MIXES = {
    "bf16": [(BF16,)] * 4,
    "f32 base": [(F32,), (BF16,), (BF16,), (F16,)],
    "mixed within models": [(F16, F32, BF16), (F32, BF16), (BF16,), (F16, BF16, F32, F16)],
    "f64": [(F64,), (F64,), (BF16, F32), (F16,)],
}


@pytest.fixture(scope="module", params=MIXES)
def family(request, tmp_path_factory):
    """Four checkpoints whose files have nothing in common: shards, order, alignment."""
    folder = tmp_path_factory.mktemp("family")
    states = random_states(11, MIXES[request.param])
    for state in states:
        state["position_ids"] = integers(range(7))
    base = write_state(folder / "base", states[0], num_shards=3, misalignment=1)
    models = [
        write_state(folder / "chat", states[1], is_reversed=True, misalignment=31),
        write_state(folder / "math", dict(sorted(states[2].items())), num_shards=5, misalignment=6),
        write_state(folder / "code.safetensors", states[3]),
    ]
    return states, base, models


def check(states, out, report, *, granularity, exponent):
    """Compare coefficients and weights of an output with the oracle's."""
    names = [name for name in states[0] if name != "position_ids"]
    scopes = oracle.scopes(names, granularity)
    assert set(report.scopes) == set(scopes)
    weights = {}
    for row, scope in zip(report.coefficients, report.scopes, strict=True):
        np.testing.assert_allclose(row, oracle.coefficients(states, scopes[scope], exponent), rtol=1e-6, atol=0)
        weights.update(dict.fromkeys(scopes[scope], row))
    return check_weights(states, read_state(out), weights)


def check_weights(states, merged, weights, *, uses_base=True):
    """Check that every element is the exact one, moved by what the arithmetic may be off, and rounded once.

    Returns:
        The part of the elements that are the exact value's own rounding.
    """
    assert merged.keys() == states[0].keys()
    num_exact = numel = 0
    for name, row in weights.items():
        actual = merged[name]
        assert actual.shape == states[0][name].shape
        # F64 anywhere makes the arithmetic F64. Otherwise the contract rounds the coefficients: 1/3 in fp32 is more
        # than 1/3, which decides where the average of three would be in the very middle of two numbers.
        is_double = any(state[name].dtype is F64 for state in [*states, merged])
        exact = oracle.combined(states, name, row if is_double else np.float32(row), uses_base=uses_base)
        # T deltas and T multiply-adds are rounded, by half a unit of the largest operand each; one more to be safe.
        scale = oracle.magnitude(states, name) * max(1.0, np.abs(row).max())
        inner = (len(row) + 1) * oracle.ulp(scale, F64 if is_double else F32)
        assert np.all(actual.values >= oracle.rounded(exact - inner, actual.dtype)), name
        assert np.all(actual.values <= oracle.rounded(exact + inner, actual.dtype)), name
        num_exact += np.count_nonzero(actual.values == oracle.rounded(exact, actual.dtype))
        numel += exact.size
    return num_exact / numel


@pytest.mark.parametrize("exponent", [2, 1, 0, -1])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_metagpt(family, tmp_path, granularity, exponent):
    states, base, models = family
    report = mf.merge(base, models, tmp_path / "out", granularity=granularity, exponent=exponent)
    check(states, tmp_path / "out", report, granularity=granularity, exponent=exponent)
    merged = read_state(tmp_path / "out")
    assert {name: each.dtype for name, each in merged.items()} == {n: each.dtype for n, each in states[0].items()}
    assert merged["position_ids"].raw.tobytes() == states[0]["position_ids"].raw.tobytes()
    vectors = oracle.task_vectors(states, SHAPES)
    np.testing.assert_allclose(report.norms, [np.linalg.norm(v) for v in vectors], rtol=1e-6)
    norms = np.outer(report.norms, report.norms)
    np.testing.assert_allclose(report.cosines, np.array(vectors) @ np.array(vectors).T / norms, atol=1e-6)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
def test_dtype_of_the_output(family, tmp_path, dtype, granularity):
    states, base, models = family
    report = mf.merge(base, models, tmp_path / "out", dtype=dtype, granularity=granularity)
    merged = read_state(tmp_path / "out")
    assert {each.dtype for name, each in merged.items() if name in SHAPES} == {OUTPUT_DTYPES[dtype]}
    check(states, tmp_path / "out", report, granularity=granularity, exponent=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == OUTPUT_DTYPES[dtype].torch_name


@pytest.mark.parametrize(
    ("settings", "weights", "uses_base"),
    [
        ({"method": "task_arithmetic"}, (0.3, 0.3, 0.3), True),
        ({"method": "task_arithmetic", "coefficients": (0.5, -0.25, 1.5)}, (0.5, -0.25, 1.5), True),
        ({"method": "linear"}, (1 / 3, 1 / 3, 1 / 3), False),
        ({"method": "linear", "coefficients": (1, 2, 5)}, (0.125, 0.25, 0.625), False),
        (
            {"method": "linear", "coefficients": (1, 2, -2.5), "parameters": {"normalize": False}},
            (1, 2, -2.5),
            False,
        ),
    ],
)
def test_methods_with_given_coefficients(family, tmp_path, settings, weights, uses_base):
    states, base, models = family
    report = mf.merge(base, models, tmp_path / "out", **settings)
    np.testing.assert_allclose(report.coefficients, [weights], rtol=1e-15)
    assert report.norms is None
    check_weights(
        states, read_state(tmp_path / "out"), dict.fromkeys(SHAPES, report.coefficients[0]), uses_base=uses_base
    )


def test_many_tiny_tensors(tmp_path):
    shapes = {f"layers.{i // 40}.t{i}": (i % 5,) for i in range(1200)}
    states = random_states(12, [(BF16,), (BF16, F32), (F16,)], shapes)
    base, models = write_family(tmp_path / "in", states, num_shards=7)
    for granularity in ("model", "layer"):
        report = mf.merge(base, models, tmp_path / granularity, granularity=granularity, max_shard_size="50KB")
        assert len(report.shards) > 1
        check(states, tmp_path / granularity, report, granularity=granularity, exponent=2)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_a_tensor_larger_than_the_window(tmp_path, granularity):
    # 64 MiB make a window of 21 MiB; the first tensor alone has 23 MB in base and models.
    shapes = {"layers.0.small": (1000,), "layers.0.large": (2_900_017,), "layers.1.rest": (270_001,)}
    states = random_states(13, [(BF16,), (BF16,), (F32,)], shapes)
    base, models = write_family(tmp_path / "in", states, misalignment=3)
    report = mf.merge(base, models, tmp_path / "out", memory="64MiB", granularity=granularity)
    assert check(states, tmp_path / "out", report, granularity=granularity, exponent=2) > 0.999
    mf.merge(base, models, tmp_path / "at once", memory="1GiB", granularity=granularity)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "at once")


dtypes = st.sampled_from([BF16, F16, F32, F64])
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
layouts = st.tuples(st.integers(1, 4), st.integers(0, 63), st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_models=st.integers(1, 5),
    shapes=st.lists(shapes, min_size=1, max_size=8),
    granularity=st.sampled_from(["model", "layer", "tensor"]),
    data=st.data(),
)
def test_any_family(seed, num_models, shapes, granularity, data):
    cycles = [data.draw(st.lists(dtypes, min_size=1, max_size=3), label="dtypes") for _ in range(1 + num_models)]
    by_name = {f"{('a', 'layers.0', 'layers.1')[i % 3]}.t{i}": shape for i, shape in enumerate([*shapes, (3, 50)])}
    states = random_states(seed, cycles, by_name)
    with TemporaryDirectory() as folder:
        paths = []
        for number, state in enumerate(states):
            num_shards, misalignment, is_reversed = data.draw(layouts, label="layout")
            num_shards = min(num_shards, len(state))
            path = Path(folder, f"in{number}")
            layout = {"num_shards": num_shards, "misalignment": misalignment, "is_reversed": is_reversed}
            paths.append(write_state(path, state, **layout))
        out = Path(folder, "out")
        report = mf.merge(paths[0], paths[1:], out, granularity=granularity, max_shard_size="10KB")
        check(states, out, report, granularity=granularity, exponent=2)


def test_the_report(tmp_path):
    base, models = three_models(tmp_path / "in", num_shards=2)
    report = mf.merge(str(base), models, tmp_path / "out")
    assert (report.base, report.models) == (str(base), tuple(map(str, models)))
    assert report.labels == ("m0", "m1", "m2")
    assert (report.method, report.parameters, report.granularity) == ("metagpt", {"exponent": 2.0}, "model")
    assert (report.num_tensors, report.num_copied, report.num_parameters) == (2, 0, 1277)
    assert report.nbytes_read == 2 * 1277 * (2 + 2 + 4 + 2)  # two passes
    assert report.nbytes_written == 1277 * 2
    assert report.shards == ("model.safetensors",)
    assert (report.backend, report.isa, report.num_threads) == ("cpu", mf.isa(), mf.num_threads())
    assert not report.measurement_reused
    record = json.loads((tmp_path / "out" / "metagpt_fast.json").read_text())
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    check_checksums(tmp_path / "out")
    assert record.pop("output")["shards"][0]["crc32c"] == f"{slow_crc32c(raw):08x}"
    assert record == {
        **json.loads(json.dumps(report.to_dict())),
        # The record is part of the output, so it cannot hold the time until the output was finished.
        "seconds": pytest.approx(report.seconds, abs=1),
    }
    one_pass = mf.merge(base, models, tmp_path / "layer", granularity="layer")
    assert one_pass.nbytes_read == 1277 * (2 + 2 + 4 + 2)
    assert one_pass.scopes == ("layers.0", "b")


def test_the_output_is_what_safetensors_reads(tmp_path):
    base, models = three_models(tmp_path / "in")
    mf.merge(base, models, tmp_path / "out")
    mf.merge(base, models, tmp_path / "bare.safetensors")
    assert tensor_bytes(tmp_path / "bare.safetensors") == tensor_bytes(tmp_path / "out")
    for path in (tmp_path / "out" / "model.safetensors", tmp_path / "bare.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name, each in read_state(tmp_path / "out").items():
                np.testing.assert_array_equal(file.get_tensor(name).double().flatten().numpy(), each.values)


class Recorder:
    """Checks the order of a progress's calls and adds up what it is told."""

    def __init__(self):
        self.phases = []
        self.is_open = False

    def start(self, phase, total_nbytes):
        assert not self.is_open
        self.is_open = True
        self.phases.append([phase, total_nbytes, 0])

    def advance(self, nbytes):
        assert self.is_open
        self.phases[-1][2] += nbytes

    def finish(self):
        assert self.is_open
        self.is_open = False


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, ["measure", "combine"]),
        ({"granularity": "layer"}, ["measure and combine"]),
        ({"granularity": "tensor"}, ["measure and combine"]),
        ({"method": "linear"}, ["combine"]),
        ({"method": "task_arithmetic", "granularity": "tensor"}, ["combine"]),
    ],
)
@pytest.mark.parametrize("window_nbytes", [1, 1000])
def test_progress_ends_at_its_total(tmp_path, monkeypatch, settings, phases, window_nbytes):
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: window_nbytes)
    base, models = three_models(tmp_path / "in")
    progress = Recorder()
    mf.merge(base, models, tmp_path / "out", progress=progress, **settings)
    assert [name for name, _, _ in progress.phases] == phases
    assert all(total == done > 0 for _, total, done in progress.phases)
    assert not progress.is_open


def test_measure_and_plan_write_nothing(tmp_path):
    base, models = three_models(tmp_path / "in")
    measurement = mf.measure(base, models)
    report = mf.merge(base, models, tmp_path / "out")
    np.testing.assert_array_equal(measurement.norms, report.norms)
    np.testing.assert_array_equal(measurement.cosines, report.cosines)
    np.testing.assert_array_equal(measurement.coefficients(), report.coefficients[0])
    assert measurement.base_norm == report.base_norm
    assert mf.plan_merge(base, models).nbytes_written == report.nbytes_written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_labels_of_models_with_one_name(tmp_path):
    states = random_states(14, [(BF16,)] * 4, {"a": (8,)})
    base = write_state(tmp_path / "base", states[0])
    paths = []
    for name, state in zip(("x/final", "y/final", "final (1)"), states[1:], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(write_state(tmp_path / name, state))
    assert mf.plan_merge(base, paths[:2]).labels == ("final (1)", "final (2)")
    assert mf.plan_merge(base, paths).labels == ("final (2)", "final (3)", "final (1)")
    assert mf.merge(base, [paths[0], paths[0]], tmp_path / "out").labels == ("final (1)", "final (2)")


def test_overwrite_and_an_output_that_exists(tmp_path):
    base, models = three_models(tmp_path / "in")
    mf.merge(base, models, tmp_path / "out", method="linear")
    before = tensor_bytes(tmp_path / "out")
    with pytest.raises(mf.OutputError, match="--overwrite"):
        mf.merge(base, models, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == before
    mf.merge(base, models, tmp_path / "out", overwrite=True)
    assert tensor_bytes(tmp_path / "out") != before


def test_threads_are_for_one_call(tmp_path):
    base, models = three_models(tmp_path / "in")
    before = mf.num_threads()
    mf.set_num_threads(before + 1)
    try:
        assert mf.merge(base, models, tmp_path / "out", threads=3).num_threads == 3
        assert mf.num_threads() == before + 1
    finally:
        mf.set_num_threads(0)


def test_combinations_of_settings_agree_on_one_model(tmp_path):
    """With T = 1 every granularity and exponent gives λ = 1: the model itself, in the base's dtype."""
    states = random_states(15, [(BF16,), (BF16,)])
    base, models = write_family(tmp_path / "in", states)
    expected = {name: each.raw.tobytes() for name, each in states[1].items()}
    for granularity, exponent in itertools.product(["model", "tensor"], [2, 0, -1]):
        out = tmp_path / f"{granularity}{exponent}"
        mf.merge(base, models, out, granularity=granularity, exponent=exponent)
        differing = [name for name, raw in tensor_bytes(out).items() if raw != expected[name]]
        values = read_state(out)
        # base + (model − base) rounds where base is far larger; to bf16 that shows in hardly any element.
        assert sum(np.count_nonzero(values[n].values != states[1][n].values) for n in differing) <= 1


@pytest.mark.parametrize(
    ("settings", "events"),
    [
        ({}, ["measure", "kernel", "combine", "kernel"]),
        ({"granularity": "layer"}, ["measure and combine", "kernel"]),
        ({"method": "linear"}, ["combine", "kernel"]),
    ],
    ids=str,
)
def test_a_phase_begins_before_its_first_batch(tmp_path, monkeypatch, settings, events):
    happened = []

    class Starts(Recorder):
        def start(self, phase, total_nbytes):
            super().start(phase, total_nbytes)
            happened.append(phase)

    for name in ("layer_gram", "layer_merge"):
        kernel = getattr(CpuBackend, name)
        monkeypatch.setattr(CpuBackend, name, lambda *a, kernel=kernel: happened.append("kernel") or kernel(*a))
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: 1000)
    base, models = three_models(tmp_path / "in")
    mf.merge(base, models, tmp_path / "out", progress=Starts(), **settings)
    assert [event for event, _ in itertools.groupby(happened)] == events
