"""Merges of the mergekit front end that cannot begin, end early, or are resumed."""

from __future__ import annotations

import itertools
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metagpt_fast import merging, recorder
from metagpt_fast.errors import OutputError, PlanError
from metagpt_fast.integrations import mergekit_tasks
from metagpt_fast.integrations.mergekit import FastMerge, run_merge
from metagpt_fast.layer_pass import LayerPass

from .checkpoints import tensor_bytes
from .mergekit_models import with_paths
from .mergekit_recipes import LINEAR, TIES, models

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others deprecate in it
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]'")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def fast(zoo: Path, tmp_path: Path) -> Callable[..., FastMerge]:
    """Return what runs a configuration with the engine, into the folder ``out``."""

    def run(config: dict[str, Any], out: str = "out", *, overwrite: bool = False, resume: bool = False) -> FastMerge:
        made = MergeConfiguration.model_validate(with_paths(config, zoo))
        return run_merge(made, str(tmp_path / out), MergeOptions(quiet=True), overwrite=overwrite, resume=resume)

    return run


def test_an_output_that_exists_is_not_touched(fast, tmp_path):
    fast(LINEAR)
    before = tensor_bytes(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        fast(TIES | {"parameters": {"weight": 1}})
    assert tensor_bytes(tmp_path / "out") == before
    fast(TIES | {"parameters": {"weight": 1}}, overwrite=True)
    assert tensor_bytes(tmp_path / "out") != before
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_nothing_is_left_of_a_merge_that_fails(fast, tmp_path, monkeypatch):
    def fail(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metagpt_fast.layer_pass.LayerPass.merge", fail)
    with pytest.raises(KeyboardInterrupt):
        fast(LINEAR)
    assert list(tmp_path.iterdir()) == []


# Embeddings are mergekit's work.
OTHER_TOKENIZER = {
    "merge_method": "slerp",
    "base_model": "llama/base",
    "dtype": "float32",
    "models": models("a", family="larger"),
    "parameters": {"t": 0.5},
    "tokenizer_source": "llama/base",
}


@pytest.mark.parametrize(
    "config", [{**TIES, "parameters": {"coefficients": "metagpt"}}, OTHER_TOKENIZER], ids=["ours", "mixed"]
)
def test_an_interrupted_merge_is_resumed(fast, tmp_path, monkeypatch, config):
    fast(config, "expected")
    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1 << 14)  # many batches, each recorded as soon as it is done
    monkeypatch.setattr(recorder, "RECORD_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        combine, calls = LayerPass._combine, itertools.count()

        def interrupted(*arguments: Any) -> None:
            if next(calls) == 6:
                raise KeyboardInterrupt
            combine(*arguments)

        patched.setattr(LayerPass, "_combine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "expected"]
    with pytest.raises(OutputError, match="an interrupted merge to this output is there"):
        fast(config)
    with pytest.raises(OutputError, match="it was another one"):
        fast({**config, "dtype": "float32", "out_dtype": "float16"}, resume=True)
    merged = fast(config, resume=True)
    assert merged.report is not None and merged.report.num_resumed > 0
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_resuming_is_refused_if_mergekit_computes_other_bytes(fast, monkeypatch):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1 << 14)
    monkeypatch.setattr(recorder, "RECORD_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr("metagpt_fast.merging.make_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fast(OTHER_TOKENIZER)
    original = mergekit_tasks.run_tasks

    def other(tasks: Any, options: Any, **more: Any) -> Any:
        return (
            (task, value + 1 if torch.is_tensor(value) else value) for task, value in original(tasks, options, **more)
        )

    monkeypatch.setattr(mergekit_tasks, "run_tasks", other)
    with pytest.raises(OutputError, match=r"it was another one.*computed"):
        fast(OTHER_TOKENIZER, resume=True)


def test_two_sets_of_files_in_one_folder(zoo, fast, tmp_path):
    """mergekit would read the old weights, by the index that is left of them."""
    model = shutil.copytree(zoo / "llama" / "a", tmp_path / "model")
    shutil.copy(zoo / "tied" / "a" / "model.safetensors", model)
    with pytest.raises(PlanError, match="weights of two models"):
        fast({**LINEAR, "models": [{"model": str(model), "parameters": {"weight": 1}}]})


def test_shapes_that_differ(fast):
    config = {"merge_method": "linear", "models": [*models("a", weight=1), *models("a", family="larger", weight=1)]}
    with pytest.raises(PlanError, match=re.escape("tokenizer: {source: base}")):
        fast(config)
