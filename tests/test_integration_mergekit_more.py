"""What the mergekit front end does beside merging as mergekit does: MetaGPT, options, the command."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metagpt_fast
from metagpt_fast.errors import IntegrationError, RecipeError
from metagpt_fast.integrations import mergekit as integration
from metagpt_fast.integrations import mergekit_cli
from metagpt_fast.integrations.mergekit import FastMerge, patch, register, run_merge

from .checkpoints import read_state, tensor_bytes
from .mergekit_models import with_paths
from .mergekit_recipes import LINEAR, TIES, models
from .tools import tool

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others deprecate in it
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]'")
    import mergekit.merge
    import mergekit.scripts.multimerge
    import yaml
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import TensorGroup, merge_method
    from mergekit.options import MergeOptions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def fast(zoo: Path, tmp_path: Path) -> Callable[..., FastMerge]:
    """Return what runs a configuration with the engine, into the folder ``out``."""

    def run(config: dict[str, Any], out: str = "out", **options: Any) -> FastMerge:
        made = MergeConfiguration.model_validate(with_paths(config, zoo))
        return run_merge(made, str(tmp_path / out), MergeOptions(quiet=True, **options))

    return run


@pytest.fixture
def metagpt_fast_run(zoo: Path, tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, bytes]]:
    """Return what runs a recipe with ``metagpt-fast run``."""

    def run(config: dict[str, Any]) -> dict[str, bytes]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(with_paths(config, zoo)))
        metagpt_fast.run(path, tmp_path / "run", overwrite=True)
        return tensor_bytes(tmp_path / "run")

    return run


# MetaGPT


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor", None])
def test_metagpt_is_a_method_of_mergekit(fast, metagpt_fast_run, tmp_path, granularity):
    parameters = {"exponent": 1.5} | ({"granularity": granularity} if granularity else {})
    config = {**TIES, "merge_method": "metagpt", "parameters": parameters}
    merged = fast(config)
    assert tensor_bytes(tmp_path / "out") == metagpt_fast_run(config)
    assert merged.report is not None and merged.report.granularity == (granularity or "model")
    assert merged.report.coefficients.sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs"])
def test_metagpts_coefficients_for_methods_that_prune(fast, metagpt_fast_run, tmp_path, method):
    config = {**TIES, "merge_method": method, "parameters": {"density": 0.6, "coefficients": "metagpt", "exponent": 1}}
    merged = fast(config)
    assert merged.by_mergekit == {}
    assert tensor_bytes(tmp_path / "out") == metagpt_fast_run(config)
    # The configuration in the output is what was asked for.
    assert "weight" not in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_weights_are_given_or_asked_for(fast):
    with pytest.raises(RecipeError, match="given and asked for"):
        fast({**TIES, "parameters": {"coefficients": "metagpt", "weight": 0.3}})
    with pytest.raises(RecipeError, match="one value for the whole merge"):
        fast({**TIES, "parameters": {"coefficients": [0.3, 0.4, 0.5], "weight": 1}})
    with pytest.raises(IntegrationError, match="'model', 'layer' or 'tensor'"):
        fast({**TIES, "merge_method": "metagpt", "parameters": {"granularity": "block"}})


def test_mergekits_own_executor_has_single_tensors(zoo, fast, tmp_path):
    register()
    config = {**TIES, "merge_method": "metagpt", "parameters": {"granularity": "tensor"}}

    def by_mergekit(config: dict[str, Any]) -> None:
        made = MergeConfiguration.model_validate(with_paths(config, zoo))
        mergekit.merge.run_merge(made, str(tmp_path / "theirs"), MergeOptions(quiet=True))

    by_mergekit(config)
    fast(config)
    assert tensor_bytes(tmp_path / "theirs") == tensor_bytes(tmp_path / "out")
    with pytest.raises(IntegrationError, match="sees one tensor at a time"):
        by_mergekit({**config, "parameters": {}})


# Who makes what


def test_methods_of_others_run_through_mergekit(fast, tmp_path):
    @merge_method(name="halve")
    def halve(group: TensorGroup) -> torch.Tensor:
        return group.entries[0].tensor / 2

    merge_methods.register(halve)
    try:
        merged = fast({"merge_method": "halve", "models": models("a")})
    finally:
        del merge_methods.registry._METHODS["halve"]
    assert merged.num_tensors == 0
    assert list(merged.by_mergekit) == ["the engine has no method halve"]
    assert "30 by mergekit's own tasks (30: the engine has no method halve)" in merged.summary
    found = json.loads((tmp_path / "out" / "metagpt_fast.json").read_text())
    assert found["method"] == "halve" and found["num_copied"] == 0
    assert len(found["tool"]["by_mergekit"]["the engine has no method halve"]) == 30
    state, source = read_state(tmp_path / "out"), read_state(Path(found["base"]))
    assert state.keys() == source.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.values, source[name].values / 2)


def test_pickle_checkpoints_run_through_mergekit(zoo, fast, tmp_path):
    model = shutil.copytree(zoo / "tied" / "a", tmp_path / "pickled")
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    merged = fast({**LINEAR, "models": [{"model": str(model), "parameters": {"weight": 1}}]})
    assert set(merged.by_mergekit) == {"read from pickle files"}
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(zoo / "tied" / "a")


def test_dtypes_that_differ_are_promoted(zoo, fast, tmp_path):
    listed = [*models("a", weight=0.5), *models("a", family="llama32", weight=0.5)]
    fast({"merge_method": "linear", "models": listed})
    assert {tensor.dtype.name for tensor in read_state(tmp_path / "out").values()} == {"F32"}


def test_tensors_that_mergekit_does_not_know_are_named(zoo, fast, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("a", "b"):
        model = shutil.copytree(zoo / "tied" / name, tmp_path / name)
        state = load_file(model / "model.safetensors")
        save_file({**state, "model.layers.0.extra.weight": torch.zeros(3)}, model / "model.safetensors")
    config = {**LINEAR, "models": [{"model": str(tmp_path / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]}
    merged = fast(config)
    assert merged.report is not None
    assert sum("model.layers.0.extra.weight" in warning for warning in merged.report.warnings) == 2


def test_a_model_merged_with_itself(fast, tmp_path, zoo):
    config = {**TIES, "merge_method": "task_arithmetic", "models": models("base"), "parameters": {"weight": 1.0}}
    fast(config)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(zoo / "llama" / "base")


# Options


def test_the_seed_is_mergekits_option(fast, tmp_path):
    config = {**TIES, "merge_method": "dare_linear", "parameters": {"density": 0.5, "weight": 0.5}}
    for out, seed in (("1", 1), ("1 again", 1), ("2", 2)):
        fast(config, out, random_seed=seed)
    assert tensor_bytes(tmp_path / "1") == tensor_bytes(tmp_path / "1 again")
    assert tensor_bytes(tmp_path / "1") != tensor_bytes(tmp_path / "2")


def test_shards_cards_and_tokenizers(fast, tmp_path):
    fast(LINEAR, "plain", write_model_card=False, copy_tokenizer=False)
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert files == {"config.json", "metagpt_fast.json", "model.safetensors"}
    fast(LINEAR, "shards", out_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert tensor_bytes(tmp_path / "shards") == tensor_bytes(tmp_path / "plain")
    fast(LINEAR, "one", out_shard_size=-1)
    assert (tmp_path / "one" / "model.safetensors").exists()


def test_pickle_outputs_are_mergekits(fast, tmp_path):
    merged = fast(LINEAR, safe_serialization=False)
    assert merged.report is None
    assert (tmp_path / "out" / "pytorch_model.bin").exists()
    with pytest.raises(RecipeError, match="pickle"):
        fast({**TIES, "merge_method": "metagpt", "parameters": {}}, "other", safe_serialization=False)


def test_options_without_effect_are_said_to_be_so():
    notes = mergekit_cli.ignored_options(MergeOptions(low_cpu_memory=True, async_write=True, cuda=True))
    assert [note.split()[0] for note in notes] == ["--low-cpu-memory", "--async-write", "--device"]
    assert mergekit_cli.ignored_options(MergeOptions()) == []


@pytest.mark.parametrize(("version", "message"), [("0.1.4", "0.1.4"), (None, "not installed")])
def test_other_versions_are_refused(fast, monkeypatch, version, message):
    def of(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", of)
    with pytest.raises(IntegrationError, match=f"{message}.*expected mergekit 0.1.5"):
        fast(LINEAR)


# mergekit's own commands


def test_patch_is_for_all_of_mergekit(zoo, tmp_path, caplog):
    """A merge of two stages, as mergekit-multi makes it: the second one uses the result of the first."""
    first = {"name": "first", **with_paths(LINEAR, zoo)}
    second = {**with_paths({**TIES, "models": models("c", weight=0.5)}, zoo)}
    second["models"].append({"model": "first", "parameters": {"weight": 0.5}})
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump_all([first, second]))
    original = mergekit.merge.run_merge
    arguments = [str(path), "-I", str(tmp_path / "between"), "--out-path", str(tmp_path / "out"), "--quiet"]
    with caplog.at_level(logging.INFO), patch():
        mergekit.scripts.multimerge.main(arguments, standalone_mode=False)
    assert mergekit.merge.run_merge is original
    assert mergekit.scripts.multimerge.run_merge is original
    assert sum("30 tensors merged by metagpt_fast" in record.message for record in caplog.records) == 2
    for folder in (tmp_path / "between" / "first", tmp_path / "out"):
        assert (folder / "metagpt_fast.json").exists()
    plain = [str(path), "-I", str(tmp_path / "plain"), "--out-path", str(tmp_path / "plain-out"), "--quiet"]
    mergekit.scripts.multimerge.main(plain, standalone_mode=False)
    assert not (tmp_path / "plain-out" / "metagpt_fast.json").exists()


def test_patches_within_each_other(zoo, tmp_path):
    with patch(), patch(overwrite=True):
        made = MergeConfiguration.model_validate(with_paths(LINEAR, zoo))
        mergekit.merge.run_merge(made, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert (tmp_path / "out" / "metagpt_fast.json").exists()
    assert not hasattr(mergekit.merge.run_merge, "_metagpt_fast_original")


# The command


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("mergekit-yaml-fast"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_the_command(zoo, tmp_path, metagpt_fast_run):
    """Keys that metagpt-fast run has at the top level work; others that mergekit does not know are named."""
    config = {**TIES, "coefficients": "metagpt", "granularity": "layer"}
    expected = metagpt_fast_run(config)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({**with_paths(config, zoo), "outdtype": "float16"}))
    done = command(tmp_path, "config.yml", "out", "--async-write", "--out-shard-size", "1M", "-j", "1")
    assert done.returncode == 0, done.stderr
    assert tensor_bytes(tmp_path / "out") == expected
    assert "30 tensors merged by metagpt_fast, 0 by mergekit's own tasks; " in done.stderr
    assert "mergekit knows no 'outdtype' and ignores it; did you mean out_dtype?" in done.stderr
    assert "--async-write has no effect" in done.stderr
    assert "combine" in done.stderr
    again = command(tmp_path, "config.yml", "out")
    assert again.returncode == 1
    assert "error: " in again.stderr and "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_command_without_waiting_for_the_disk(zoo, tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *arguments: calls.append(arguments))
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(with_paths(LINEAR, zoo)))
    run = mergekit_cli._command().main
    run([str(config), str(tmp_path / "out"), "--quiet", "--no-sync"], standalone_mode=False)
    assert calls == []
    run([str(config), str(tmp_path / "synced"), "--quiet"], standalone_mode=False)
    assert calls
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "synced")


def test_the_commands_messages(tmp_path):
    (tmp_path / "bad.yml").write_text("merge_method: linear\nmodels: [{model: /nowhere/at/all}]\n")
    done = command(tmp_path, "bad.yml", "out", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    # The last line of ours: a library that mergekit imports may report its leaks behind it.
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "/nowhere/at/all" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yml"]
    for content, message in (("- a", "not a configuration"), ("a: [", "not valid YAML")):
        with pytest.raises(RecipeError, match=message):
            mergekit_cli.with_our_keys(content, "x.yml", {"models"})


def test_nothing_is_imported_before_it_is_needed():
    code = "import sys, metagpt_fast.integrations; print([n for n in ('mergekit', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert integration.__all__ == ["FastMerge", "patch", "register", "run_merge"]
