"""The measurement file: what it saves, what it refuses, and that nothing changes with it but the time."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast import merging
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, F16, F32
from metagpt_fast.layer_pass import LayerPass

from . import oracle
from .checkpoints import digests, random_states, tensor_bytes, write_family, write_state

SHAPES = {"layers.0.a": (40, 30), "layers.1.a": (40, 31), "norm": (), "empty": (0,), "head": (9, 9)}
STATES = random_states(41, [(BF16,), (BF16,), (F32, BF16), (F16,)], SHAPES)


@pytest.fixture
def family(tmp_path):
    return write_family(tmp_path / "in", STATES, num_shards=2)


@pytest.fixture
def saved(family, tmp_path):
    """Inputs, and the file with their measurement."""
    base, models = family
    mf.measure(base, models).save(tmp_path / "m.json")
    return base, models, tmp_path / "m.json"


def refusal(base, models, out, measurement):
    with pytest.raises(mf.MeasurementError) as caught:
        mf.merge(base, models, out, measurement=measurement)
    assert not out.exists()
    assert caught.value.where == str(measurement)
    return caught.value


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_a_merge_makes_and_reuses_it(family, tmp_path, granularity):
    base, models = family
    settings = {"granularity": granularity, "measurement": tmp_path / "m.json"}
    fresh = mf.merge(base, models, tmp_path / "fresh", **settings)
    content = (tmp_path / "m.json").read_bytes()
    again = mf.merge(base, models, tmp_path / "again", **settings)
    assert (fresh.measurement_reused, again.measurement_reused) == (False, True)
    nbytes = sum(each.raw.nbytes for state in STATES for each in state.values())
    assert fresh.nbytes_read == (2 if granularity == "model" else 1) * nbytes
    assert again.nbytes_read == nbytes
    assert again.seconds_measure == 0
    assert tensor_bytes(tmp_path / "again") == tensor_bytes(tmp_path / "fresh")
    for name in ("coefficients", "norms", "cosines"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fresh, name))
    assert (again.base_norm, again.warnings) == (fresh.base_norm, fresh.warnings)
    assert (tmp_path / "m.json").read_bytes() == content


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("chosen", [(2, 0), (1,), (2, 1, 0), (1, 1)])
def test_some_of_the_models_in_any_order(saved, tmp_path, chosen, granularity):
    base, models, file = saved
    subset = [models[t] for t in chosen]
    fresh = mf.merge(base, subset, tmp_path / "fresh", granularity=granularity)
    reused = mf.merge(base, subset, tmp_path / "reused", granularity=granularity, measurement=file)
    assert reused.measurement_reused
    np.testing.assert_array_equal(reused.coefficients, fresh.coefficients)
    np.testing.assert_array_equal(reused.cosines, fresh.cosines)
    assert tensor_bytes(tmp_path / "reused") == tensor_bytes(tmp_path / "fresh")


def test_round_trip(saved):
    base, models, file = saved
    measured, loaded = mf.measure(base, models), mf.Measurement.load(file)
    for field in dataclasses.fields(mf.Measurement):
        np.testing.assert_equal(getattr(loaded, field.name), getattr(measured, field.name))
    assert loaded.to_dict() == measured.to_dict() == json.loads(file.read_text())


def test_its_numbers(saved):
    measured = mf.Measurement.load(saved[2])
    vectors = np.array(oracle.task_vectors(STATES, list(SHAPES)))
    np.testing.assert_allclose(measured.norms, np.linalg.norm(vectors, axis=1), rtol=1e-6)
    np.testing.assert_allclose(measured.total[1:, 1:], vectors @ vectors.T, atol=1e-6 * measured.norms.max() ** 2)
    for exponent in (2, 1, 0, -1):
        expected = oracle.coefficients(STATES, list(SHAPES), exponent)
        np.testing.assert_allclose(measured.coefficients(exponent), expected, rtol=1e-6)
    np.testing.assert_allclose(np.diagonal(measured.cosines), 1, rtol=1e-15)
    base = np.concatenate([np.atleast_1d(STATES[0][name].values) for name in SHAPES])
    assert measured.base_norm == pytest.approx(np.linalg.norm(base), rel=1e-6)
    facts = dict(zip(measured.names, zip(measured.layers, measured.numels.tolist(), strict=True), strict=True))
    assert facts == {
        "layers.0.a": ("layers.0", 1200),
        "layers.1.a": ("layers.1", 1240),
        "norm": ("norm", 1),
        "empty": ("empty", 0),
        "head": ("head", 81),
    }


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_measuring_does_not_depend_on_windows_and_threads(family, monkeypatch, io):
    base, models = family
    expected = mf.measure(base, models, threads=1).gram
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: 100)
    np.testing.assert_array_equal(mf.measure(base, models, threads=3, io=io).gram, expected)


def test_the_command_line_saves_what_merge_takes(family, tmp_path):
    base, models = family
    inputs = [str(path) for path in (base, *models)]
    runner = CliRunner()
    result = runner.invoke(cli, ["measure", *inputs, "-o", str(tmp_path / "m.json"), "--quiet"])
    assert result.exit_code == 0, result.output
    arguments = ["merge", *inputs, "--quiet", "--json", "-o"]
    result = runner.invoke(cli, [*arguments, str(tmp_path / "a"), "--measurement", str(tmp_path / "m.json")])
    assert json.loads(result.stdout)["measurement_reused"] is True
    assert runner.invoke(cli, [*arguments, str(tmp_path / "b")]).exit_code == 0
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(tmp_path / "b")


def test_excluded_tensors(saved, tmp_path):
    base, models, file = saved
    fresh = mf.merge(base, models, tmp_path / "fresh", exclude="head|norm")
    reused = mf.merge(base, models, tmp_path / "reused", exclude="head|norm", measurement=file)
    np.testing.assert_array_equal(reused.coefficients, fresh.coefficients)
    assert tensor_bytes(tmp_path / "reused") == tensor_bytes(tmp_path / "fresh")
    mf.measure(base, models, exclude="head").save(file)
    error = refusal(base, models, tmp_path / "out", file)
    assert "'head' was not measured" in error.what
    assert "excluded" in error.hint


def test_methods_that_need_none_leave_it_alone(saved, tmp_path):
    base, models, file = saved
    file.write_text("garbage")
    for method in ("task_arithmetic", "linear"):
        report = mf.merge(base, models, tmp_path / method, method=method, measurement=file)
        assert not report.measurement_reused
    mf.merge(base, models, tmp_path / "none", method="linear", measurement=tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def touch(base, models, file):
    os.utime(models[0] / "model-00001-of-00002.safetensors", ns=(1, 1))


def touch_base(base, models, file):
    os.utime(base / "model-00002-of-00002.safetensors", ns=(1, 1))


def rewrite(base, models, file):
    """Other weights under the same name, size and time."""
    path = models[2] / "model-00001-of-00002.safetensors"
    stats = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))


def swap_base(base, models, file):
    base.rename(base.with_name("old"))
    models[0].rename(base)
    base.with_name("old").rename(models[0])


def another_model(base, models, file):
    shutil.rmtree(models[1])
    write_state(models[1], random_states(42, [(BF16,)], SHAPES)[0], num_shards=2)


@pytest.mark.parametrize("change", [touch, touch_base, rewrite, swap_base, another_model])
def test_stale_ones_are_refused(saved, tmp_path, change):
    base, models, file = saved
    change(base, models, file)
    error = refusal(base, models, tmp_path / "out", file)
    assert "belongs to other files" in error.what
    assert "delete the file" in error.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "m.json"]


def test_moved_checkpoints_are_the_same(saved, tmp_path):
    base, models, file = saved
    base.rename(tmp_path / "moved")
    assert mf.merge(tmp_path / "moved", models, tmp_path / "out", measurement=file).measurement_reused


def edited(**changes):
    return lambda content: json.dumps({**content, **changes})


def in_tensor(**changes):
    return lambda content: json.dumps({**content, "tensors": [{**each, **changes} for each in content["tensors"]]})


def without(key):
    return lambda content: json.dumps({name: value for name, value in content.items() if name != key})


HOSTILE = {
    "empty": lambda content: "",
    "truncated": lambda content: json.dumps(content)[:-200],
    "binary": lambda content: "\0\1\2" * 100,
    "a list": lambda content: "[1, 2]",
    "deep nesting": lambda content: '{"format":' + "[" * 100_000 + "]" * 100_000 + "}",
    "NaN": lambda content: json.dumps(content).replace('"gram": [', '"gram": [NaN, ', 1),
    "a key twice": lambda content: '{"format": 1, ' + json.dumps(content)[1:],
    "another format": edited(format="something"),
    "a later version": edited(version=2),
    "tensors: null": edited(tensors=None),
    "tensors: number": edited(tensors=5),
    "tensors: empty": edited(tensors=[]),
    "tensors: object": edited(tensors={"a": 1}),
    "tensors: strings": edited(tensors=["a", "b"]),
    "a tensor twice": lambda content: json.dumps({**content, "tensors": content["tensors"] * 2}),
    "gram: too short": in_tensor(gram=[1.0]),
    "gram: too long": in_tensor(gram=[1.0] * 99),
    "gram: nested": in_tensor(gram=[[1.0]] * 10),
    "gram: text": in_tensor(gram=["x"] * 10),
    "gram: long text": in_tensor(gram=["x" * 5000] * 10),
    "gram: null": in_tensor(gram=None),
    "gram: huge integer": in_tensor(gram=[10**400] * 10),
    "gram: Inf": lambda content: json.dumps(content).replace('"gram": [', '"gram": [1e999, ', 1),
    "gram: negative square": in_tensor(gram=[-1.0] * 10),
    "numel: text": in_tensor(numel="many"),
    "numel: list": in_tensor(numel=[1, 2]),
    "numel: negative": in_tensor(numel=-1),
    "numel: huge": in_tensor(numel=2**70),
    "name: number": in_tensor(name=5),
    "layer: null": in_tensor(layer=None),
    "models: number": edited(models=3),
    "models: too few": edited(models=[]),
    "models: objects": edited(models=[{}, {}, {}]),
    "labels: too few": edited(labels=["a"]),
    "base: null": edited(base=None),
    "fingerprints: null": edited(fingerprints=None),
    "fingerprints: too few": edited(fingerprints=[[]]),
    "fingerprints: numbers": edited(fingerprints=[1, 2, 3, 4]),
    **{
        f"no {key}": without(key)
        for key in ("format", "version", "base", "models", "labels", "fingerprints", "tensors")
    },
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(saved, tmp_path, make):
    base, models, file = saved
    file.write_text(make(json.loads(file.read_text())))
    before = file.read_bytes()
    error = refusal(base, models, tmp_path / "out", file)
    assert "measurement" in str(error)
    assert len(str(error)) < 1000
    assert file.read_bytes() == before


def test_models_that_would_need_gigabytes(saved):
    """A Gram matrix of the models that a file names, before its numbers are counted, would be 3 GiB of indices."""
    many = {"models": ["m"] * 20_000, "labels": ["m"] * 20_000, "fingerprints": [[]] * 20_001}
    _, _, file = saved
    file.write_text(edited(**many)(json.loads(file.read_text())))
    tracemalloc.start()
    with pytest.raises(mf.MeasurementError, match="200030001 numbers per tensor"):
        mf.Measurement.load(file)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_every_truncation_is_refused(saved):
    file = saved[2]
    content = file.read_bytes()
    for length in range(0, len(content) - 2, 97):
        file.write_bytes(content[:length])
        with pytest.raises(mf.MeasurementError):
            mf.Measurement.load(file)


def test_what_is_no_file(saved, tmp_path):
    base, models, _ = saved
    (tmp_path / "folder").mkdir()
    refusal(base, models, tmp_path / "out", tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    refusal(base, models, tmp_path / "out", tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    refusal(base, models, tmp_path / "out", tmp_path / "link")


def test_a_file_that_cannot_be_saved_is_found_before_the_work(family, tmp_path):
    base, models = family
    refusal(base, models, tmp_path / "out", tmp_path / "no folder" / "m.json")
    measurement = mf.measure(base, models)
    for path in (tmp_path / "no folder" / "m.json", tmp_path, Path()):
        with pytest.raises(mf.MeasurementError, match="cannot write the measurement"):
            measurement.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_saving_replaces_the_file_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    base, models, file = saved
    before = file.read_bytes()
    measurement = mf.measure(base, models[:1])

    def fail(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(mf.MeasurementError, match="No space left"):
            measurement.save(file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "m.json"]
    measurement.save(file)
    assert mf.Measurement.load(file).models == (str(models[0]),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "m.json"]


def test_only_a_measurement_or_an_empty_file_is_replaced(family, tmp_path):
    base, models = family
    before = digests(tmp_path / "in")
    measurement = mf.measure(base, models)
    weights = next(models[0].glob("*.safetensors"))
    os.mkfifo(tmp_path / "pipe")
    for path in (weights, base / "config.json", tmp_path / "pipe"):
        with pytest.raises(mf.MeasurementError, match="cannot write the measurement"):
            measurement.save(path)
        assert digests(tmp_path / "in") == before
    assert (tmp_path / "pipe").is_fifo()
    file = tmp_path / "m.json"
    file.touch()
    measurement.save(file)
    measurement.save(file)
    np.testing.assert_array_equal(mf.Measurement.load(file).gram, measurement.gram)


def test_the_command_line_refuses_such_a_file_before_the_work(family, tmp_path, monkeypatch):
    base, models = family
    monkeypatch.setattr(LayerPass, "measure", lambda layers: pytest.fail("it has begun to measure"))
    result = CliRunner().invoke(cli, ["measure", str(base), str(models[0]), "-o", str(base / "config.json")])
    assert result.exit_code == 1
    assert "not a measurement" in result.stderr


@pytest.mark.parametrize("code, hint", [(errno.ENOSPC, "free some space"), (errno.EIO, "choose another place")])
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_disk_that_takes_no_measurement_is_found_before_the_work(family, tmp_path, monkeypatch, call, code, hint):
    base, models = family
    monkeypatch.setattr(LayerPass, "_measure", lambda *a: pytest.fail("it has begun to measure"))
    opened = Path.open

    def failing(self, mode="r", *arguments, **more):
        if call == "open" and mode.startswith("x"):
            raise OSError(code, os.strerror(code))
        return opened(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", failing)
    if call == "write":
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(mf.MeasurementError, match=rf"cannot write .*{os.strerror(code)}.*{hint}"):
        mf.measure(base, models, out=tmp_path / "m.json")
    with pytest.raises(mf.MeasurementError, match=os.strerror(code)):
        mf.merge(base, models, tmp_path / "out", measurement=tmp_path / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_space_looked_for_is_enough(family, tmp_path, monkeypatch):
    base, models = family
    sizes = []
    monkeypatch.setattr(merging, "check_writable", lambda path, nbytes: sizes.append(nbytes))
    mf.measure(base, models, out=tmp_path / "m.json")
    assert (tmp_path / "m.json").stat().st_size <= sizes[0]
