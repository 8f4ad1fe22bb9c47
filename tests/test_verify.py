"""verify: sound outputs of every method pass, and damage of any kind is found and named."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.safetensors_file import read_header

from .checkpoints import integers, random_states, tensor, three_models, write_family, write_state
from .damaged_outputs import edit_json, flip, forge, merged, out, problems_of
from .test_every_method import CASES, DTYPES, NUM_MODELS, SHAPES, case_id

__all__ = ["merged", "out"]  # fixtures


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return write_family(folder, random_states(5, DTYPES, SHAPES), num_shards=2, misalignment=3)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=case_id)
def test_every_method_is_recomputed_to_the_bit(family, tmp_path, method, parameters):
    base, models = family
    chosen = models[: NUM_MODELS.get(method, len(models))]
    mf.merge(base, chosen, tmp_path / "out", method=method, parameters=parameters, max_shard_size=400_000)
    report = mf.verify(tmp_path / "out", full=True, inputs=True)
    assert report.ok, report.problems
    assert not report.notes
    assert report.num_recomputed == report.num_tensors == len(SHAPES)
    assert report.numel_recomputed == sum(np.prod(shape) for shape in SHAPES.values())
    assert {each.state for each in report.inputs} == {"same"}
    sample = mf.verify(tmp_path / "out")
    assert sample.ok, sample.problems


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "layer"},
        {"granularity": "tensor", "dtype": "f16"},
        {"dtype": "f64", "exclude": "layers"},
        {"method": "linear", "dtype": "f32", "io": "pread"},
        {"backend": "reference", "coefficients": (0.3, 0.2, -0.5), "method": "task_arithmetic"},
        {"backend": "reference"},
        {"method": "ties", "parameters": {"coefficients": "metagpt", "density": 0.5}, "granularity": "layer"},
    ],
    ids=case_id,
)
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_settings_of_a_merge(family, tmp_path, settings, name):
    base, models = family
    mf.merge(base, models, tmp_path / name, **settings)
    for options in ({"full": True}, {"inputs": True}, {"io": "pread", "threads": 1, "memory": "64MiB"}):
        report = mf.verify(tmp_path / name, **options)
        assert report.ok, report.problems
        assert report.num_recomputed == report.num_tensors


def test_a_sample_of_what_is_solved_together(family, tmp_path, monkeypatch):
    base, models = family
    parameters = {"coefficients": "metagpt", "density": 0.4}
    mf.merge(base, models, tmp_path / "out", method="dare_linear", parameters=parameters)
    monkeypatch.setattr("metagpt_fast.verifying._SAMPLE_NUM_TENSORS", 2)
    report = mf.verify(tmp_path / "out")
    assert report.ok, report.problems
    assert report.num_recomputed == 2


def test_a_measurement_of_more_models(family, tmp_path):
    base, models = family
    mf.measure(base, models).save(tmp_path / "measured.json")
    mf.merge(base, models[:2], tmp_path / "out", measurement=tmp_path / "measured.json")
    assert mf.verify(tmp_path / "out", full=True).ok


def test_unchanged_tensors_and_integers(tmp_path):
    """A tensor that no model changed is copied with its −0; one sampled alone must not look like 'nothing to merge'."""
    states = random_states(9, [(BF16,)] * 3, {"a": (50,), "b": (20,)})
    for state in states:
        state["frozen"] = tensor([0.5, -0.0, 0.0, -1.0])
        state["ids"] = integers([1, 2, 3])
    base, models = write_family(tmp_path, states)
    mf.merge(base, models, tmp_path / "out", granularity="tensor")
    report = mf.verify(tmp_path / "out", full=True)
    assert report.ok, report.problems
    flip(
        tmp_path / "out" / "model.safetensors",
        read_header(tmp_path / "out" / "model.safetensors").tensors[0].data_offset,
    )
    (problem,) = problems_of(mf.verify(tmp_path / "out"), "tensor")
    assert problem.tensor == "ids"
    assert "1 byte differs" in problem.what


RECIPES = {
    "gradients": """
merge_method: ties
base_model: base
models:
  - model: m0
    parameters: {weight: [0.2, 0.9], density: 0.5}
  - model: m1
    parameters: {weight: 0.4, density: [0.9, 0.3]}
dtype: float32
out_dtype: bfloat16
""",
    "slices": """
merge_method: linear
slices:
  - sources: [{model: m0, layer_range: [0, 2]}, {model: m1, layer_range: [1, 3]}]
  - sources: [{model: m2, layer_range: [0, 2]}]
parameters:
  weight: [{filter: norm, value: 0.25}, {value: 0.75}]
""",
    "metagpt": """
merge_method: metagpt
base_model: base
models: [{model: m0}, {model: m1}]
granularity: layer
""",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes(tmp_path, monkeypatch, recipe):
    shapes = {"model.embed_tokens.weight": (50, 8), "model.norm.weight": (8,), "lm_head.weight": (50, 8)}
    for layer in range(3):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": s for name, s in {"norm": (8,), "mlp.up_proj": (8, 9)}.items()
        }
    base, models = write_family(tmp_path, random_states(10, [(BF16,)] * 4, shapes))
    for path in (base, *models):
        (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    mf.run("recipe.yaml", "out/merged")
    monkeypatch.chdir("/")  # relative paths are those of the folder in which the merge was run
    report = mf.verify(tmp_path / "out" / "merged", full=True, inputs=True)
    assert report.ok, report.problems
    assert report.num_recomputed == report.num_tensors > 0


def test_any_flipped_bit_is_found_and_named(out):
    rng = np.random.default_rng(11)
    sources = [s for shard in sorted(out.glob("*.safetensors")) for s in read_header(shard).tensors if s.nbytes]
    for source in sources:
        offset = source.data_offset + int(rng.integers(source.nbytes))
        bit = int(rng.integers(8))
        flip(source.path, offset, bit)
        report = mf.verify(out)
        (found,) = report.problems
        assert (found.kind, found.tensor) == ("tensor", source.name)
        assert source.path.name in found.where
        assert [each.name for each in report.shards if each.state == "damaged"] == [source.path.name]
        assert "one flipped bit" in found.what
        is_copied = source.name == "lm_head.weight"
        index = (offset - source.data_offset) // (1 if is_copied else source.dtype.itemsize)
        assert f"at index {index}:" in found.what
        assert not report.ok
        flip(source.path, offset, bit)
    assert mf.verify(out).ok


def test_any_flipped_bit_of_a_header_is_found(out):
    path = sorted(out.glob("*.safetensors"))[1]
    for offset in [0, 3, *range(8, 200, 7), 4000]:
        flip(path, offset, 1)
        report = mf.verify(out)
        assert problems_of(report, "header")[0].where == str(path), offset
        assert "the header is not the one that was written" in problems_of(report, "header")[0].what, offset
        assert [each.name for each in report.shards if each.state == "damaged"] == [path.name]
        flip(path, offset, 1)


def test_damage_with_checksums_that_fit(out):
    path = sorted(out.glob("*.safetensors"))[0]
    source = max(read_header(path).tensors, key=lambda each: each.nbytes)
    flip(path, source.data_offset + 10)
    forge(out)
    report = mf.verify(out, full=True)
    assert [(each.kind, each.tensor) for each in report.problems] == [("tensor", source.name)]


def test_other_coefficients_than_recorded(out):
    def edit(content):
        content["coefficients"][0][0] += 0.01

    edit_json(out / "metagpt_fast.json", edit)
    report = mf.verify(out, full=True)
    assert problems_of(report, "coefficients")
    assert problems_of(report, "tensor")


def test_files_that_are_missing_or_short_or_more(out):
    shards = sorted(out.glob("*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-1])
    report = mf.verify(out)
    assert [each.state for each in report.shards][:2] == ["damaged", "same"]
    assert report.nbytes_checked == sum(path.stat().st_size for path in shards[1:])
    assert "and 1" in problems_of(report, "shard")[0].what or str(len(content)) in problems_of(report, "shard")[0].what
    assert problems_of(report, "header")
    shards[0].unlink()
    report = mf.verify(out)
    assert report.shards[0].state == "missing"
    assert "is missing" in problems_of(report, "shard")[0].what
    shards[0].write_bytes(content)
    edit_json(out / "model.safetensors.index.json", lambda index: index["weight_map"].popitem())
    assert "the index does not list" in problems_of(mf.verify(out), "header")[0].what


def test_another_model_beside_the_record(out, tmp_path):
    """One file takes precedence over shards, for transformers and here."""
    write_state(tmp_path / "other", random_states(12, [(F32,)], {"other": (3,)})[0])
    shutil.copy(tmp_path / "other" / "model.safetensors", out)
    report = mf.verify(out)
    assert any("not one of the files that were written" in each.what for each in problems_of(report, "header"))
    assert {each.tensor for each in problems_of(report, "tensor")} >= {"other", "lm_head.weight"}


def test_inputs_that_changed(tmp_path):
    base, models = three_models(tmp_path)
    out = tmp_path / "out"
    mf.merge(base, models, out)
    weights = models[1] / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    report = mf.verify(out, inputs=True)
    assert report.ok
    assert [each.state for each in report.inputs] == ["same", "same", "touched", "same"]
    assert report.num_recomputed == report.num_tensors
    flip(weights, weights.stat().st_size - 1)
    report = mf.verify(out)
    assert report.ok
    assert report.num_recomputed == 0
    assert "model.safetensors has another content" in report.notes[0]
    for options in ({"inputs": True}, {"full": True}):
        (problem,) = mf.verify(out, **options).problems
        assert problem.kind == "input"
        assert str(models[1]) in problem.what
    shutil.rmtree(base)
    assert "does not exist" in mf.verify(out).notes[0]
    assert mf.verify(out, full=True).problems[0].kind == "input"


@pytest.mark.parametrize("method", ["metagpt", "linear"])
def test_a_merge_that_a_gpu_has_made(family, tmp_path, method):
    """Where there is none: it has the bits of the CPU's."""
    base, models = family
    mf.merge(base, models, tmp_path / "out", method=method)
    edit_json(tmp_path / "out" / "metagpt_fast.json", lambda content: content.update(backend="cuda"))
    report = mf.verify(tmp_path / "out", full=True)
    assert report.ok, report.problems
    assert report.num_recomputed == report.num_tensors


def test_a_merge_that_another_tool_had_planned(out, tmp_path):
    """What the tool wanted is not in the record: checksums, headers and inputs are compared, nothing is recomputed."""
    edit_json(out / "metagpt_fast.json", lambda content: content.update(tool={"name": "other"}, method="other"))
    report = mf.verify(out, inputs=True)
    assert report.ok, report.problems
    assert report.notes == ("no tensor was recomputed: another tool had made the merge's plan",)
    assert {each.state for each in report.inputs} == {"same"}
    assert [each.kind for each in mf.verify(out, full=True).problems] == ["record"]
    source = read_header(sorted(out.glob("*.safetensors"))[0]).tensors[0]
    flip(source.path, source.data_offset)
    (problem,) = mf.verify(out).problems
    assert (problem.kind, problem.tensor) == ("tensor", source.name)
    assert "CRC32C differs" in problem.what


def test_damage_of_several_tensors_and_of_the_header(out, monkeypatch):
    """Each is named, with and without the inputs; and files are read in windows that end anywhere."""
    monkeypatch.setattr("metagpt_fast.checksums._WINDOW_NBYTES", 1000)
    path = max(out.glob("*.safetensors"), key=lambda each: len(read_header(each).tensors))
    first, *_, last = sources = [each for each in read_header(path).tensors if each.nbytes]
    assert len(sources) > 1
    in_metadata = path.read_bytes().index(b'"pt"') + 1  # read as a header all the same
    for offset in (in_metadata, first.data_offset, last.data_offset + last.nbytes - 1):
        flip(path, offset)
    for inputs in (True, False):
        report = mf.verify(out)
        assert {(each.kind, each.tensor) for each in report.problems} == {
            ("header", None), ("tensor", first.name), ("tensor", last.name)
        }  # fmt: skip
        is_recomputed = ["one flipped bit" in each.what for each in problems_of(report, "tensor")]
        assert is_recomputed == [inputs] * 2
        edit_json(out / "metagpt_fast.json", lambda content: content.update(base="/nowhere"))


def test_records_without_checksums(out):
    edit_json(out / "metagpt_fast.json", lambda content: content.pop("output"))
    report = mf.verify(out)
    assert report.ok
    assert "holds no checksums" in report.notes[0]
    assert {each.state for each in report.shards} == {"no checksum"}
    source = read_header(sorted(out.glob("*.safetensors"))[0]).tensors[0]
    flip(source.path, source.data_offset)
    assert problems_of(mf.verify(out), "tensor")[0].tensor == source.name


def test_the_command(out, tmp_path):
    result = CliRunner().invoke(cli, ["verify", str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "nothing wrong was found" in result.stdout
    assert "model-00001-of-0000" in result.stdout
    source = read_header(sorted(out.glob("*.safetensors"))[0]).tensors[0]
    flip(source.path, source.data_offset)
    result = CliRunner().invoke(cli, ["verify", str(out)])
    assert result.exit_code == 1
    assert "one flipped bit" in result.stdout
    assert source.name in result.stdout
    assert "checksum: " in result.stderr
    result = CliRunner().invoke(cli, ["verify", str(out), "--json", "--quiet"])
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert not content["ok"]
    assert content["problems"][0]["tensor"] == source.name
    result = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "there is no record of a merge" in result.stderr


def test_kernels_that_measure_something_else(out, monkeypatch):
    """The reference has the last word about norms, too."""
    from metagpt_fast import _native

    right = _native.layer_gram

    def wrong(*arguments):
        right(*arguments)
        arguments[-1][...] *= 1.001

    monkeypatch.setattr(_native, "layer_gram", wrong)
    assert "kernels are broken" in problems_of(mf.verify(out), "coefficients")[0].what


@pytest.mark.parametrize("dtype", [F16, F64])
def test_overflow_to_infinity_is_as_it_was_written(tmp_path, dtype):
    states = random_states(13, [(F64,)] * 3, {"a": (40,)})
    states[1]["a"] = tensor(np.full(40, 2e5), F64)
    base, models = write_family(tmp_path, states)
    report = mf.merge(base, models, tmp_path / "out", method="linear", dtype=dtype.name.lower())
    assert any("became Inf" in warning for warning in report.warnings) == (dtype is F16)
    assert mf.verify(tmp_path / "out", full=True).ok
