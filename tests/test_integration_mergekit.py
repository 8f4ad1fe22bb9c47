"""mergekit-yaml-fast and mergekit itself on the same configurations; mergekit runs in this process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metagpt_fast

from .checkpoints import Tensor, read_state, tensor_bytes
from .mergekit_models import with_paths
from .mergekit_recipes import RECIPES, Recipe

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others deprecate in it
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]' compares with mergekit")
    import mergekit.merge
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from metagpt_fast.integrations.mergekit import FastMerge, run_merge

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Of the largest element of a tensor: roundings of float32 in sums of several terms.
SMALLEST = 2.0**-20


@pytest.fixture
def fast(zoo: Path, tmp_path: Path) -> Callable[..., FastMerge]:
    """Return what runs a configuration with the engine."""
    return lambda config, out="ours", **options: run_merge(
        MergeConfiguration.model_validate(with_paths(config, zoo)),
        str(tmp_path / out),
        options_of(tmp_path, **options),
    )


def options_of(folder: Path, **options: Any) -> MergeOptions:
    return MergeOptions(quiet=True, lora_merge_cache=str(folder / "lora"), **options)


def by_mergekit(config: dict[str, Any], zoo: Path, out: Path, **options: Any) -> None:
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(with_paths(config, zoo)), str(out), options_of(out.parent, **options)
    )


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Everything but weights and their index is mergekit's, byte by byte; the card's title is the folder's name."""
    ignored = {"model.safetensors.index.json", "metagpt_fast.json"}
    names = [
        {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} - ignored for folder in (ours, theirs)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        expected = (theirs / name).read_bytes().replace(b"# theirs", b"# ours")
        assert (ours / name).read_bytes() == expected, name
    assert json.loads((ours / "metagpt_fast.json").read_text())["tool"]["name"] == "mergekit"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_as_mergekit(recipe: Recipe, zoo, fast, tmp_path):
    """The same tensors, dtypes and shapes; values within float32's rounding; the files around them byte by byte."""
    merged = fast(recipe.config, **recipe.options)
    by_mergekit(recipe.config, zoo, tmp_path / "theirs", **recipe.options)
    ours, theirs = read_state(tmp_path / "ours"), read_state(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert sorted(name for names in merged.by_mergekit.values() for name in names) == sorted(recipe.by_mergekit)
    for name in ours:
        pair = ours[name], theirs[name]
        if "union" in recipe.name and name in recipe.by_mergekit:
            # mergekit numbers new tokens in the random order of a hash map.
            pair = by_token(tmp_path / "ours", pair[0]), by_token(tmp_path / "theirs", pair[1])
        share = share_apart(*pair) if not recipe.is_random else 0.0
        assert share <= recipe.share_apart, f"{name}: {share:.3%} differ"
    if "union" not in recipe.name:
        assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def share_apart(mine: Tensor, other: Tensor) -> float:
    """Return the share of elements that differ by more than rounding."""
    assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
    unit = 2.0**-8 if mine.dtype.name == "BF16" else 0.0
    allowed = SMALLEST * np.abs(other.values).max(initial=0.0) + unit * np.abs(other.values)
    return float(np.mean(np.abs(mine.values - other.values) > allowed)) if mine.values.size else 0.0


def by_token(folder: Path, tensor: Tensor) -> Tensor:
    """Return a tensor with a row per token, in the order of the tokens' texts; padding rows stay behind."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    added = {
        each["content"]: each["id"] for each in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    order = [number for _, number in sorted({**vocabulary, **added}.items())]
    rows = tensor.raw.reshape(tensor.shape[0], -1)
    order += [row for row in range(len(rows)) if row not in set(order)]
    return Tensor(tensor.dtype, tensor.shape, rows[order].reshape(-1))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.is_for_run], ids=lambda recipe: recipe.name)
def test_same_bytes_as_run(recipe: Recipe, zoo, fast, tmp_path):
    fast(recipe.config, **recipe.options)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(with_paths(recipe.config, zoo)))
    metagpt_fast.run(path, tmp_path / "run")
    assert tensor_bytes(tmp_path / "ours") == tensor_bytes(tmp_path / "run")
