"""A method from another package: the one of docs/methods.md, installed as its text says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metagpt_fast.dtypes import F32

from .checkpoints import random_states, read_state, write_family

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
SHAPES = {"layers.0.weight": (40, 7), "layers.1.weight": (33,), "head": (5, 8)}


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def install(folder, code, *, group="metagpt_fast.methods", name="norm_keeping", value="norm_keeping:NormKeeping"):
    """Write what pip leaves of a package: its module, and metadata with an entry point."""
    folder.mkdir()
    (folder / "norm_keeping.py").write_text(code, encoding="utf-8")
    metadata = folder / "norm_keeping-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: norm_keeping\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n", encoding="utf-8")


@pytest.fixture
def package(tmp_path):
    """Install the method of the page, with the group and the entry point of its TOML."""
    toml = block("toml")
    (group,) = re.findall(r'^\[project\.entry-points\."(.*)"\]$', toml, re.MULTILINE)
    ((name, value),) = re.findall(r'^(\w+) = "(.*)"$', toml, re.MULTILINE)
    install(tmp_path / "site", block("python"), group=group, name=name, value=value)
    return tmp_path / "site"


def run(package, *arguments):
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "metagpt_fast", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_merging_with_it(package, tmp_path):
    states = random_states(7, [(F32,)] * 3, SHAPES)
    base, models = write_family(tmp_path / "in", states)
    merge = [
        "merge",
        base,
        *models,
        "-o",
        tmp_path / "out",
        "--method",
        "norm_keeping",
        "--set",
        "strength=0.8",
        "--json",
    ]
    result = run(package, *merge)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "norm_keeping"
    out = read_state(tmp_path / "out")
    for name in SHAPES:
        start = states[0][name].values
        vectors = [model[name].values - start for model in states[1:]]
        lengths = [np.sqrt(np.sum(vector**2)) for vector in vectors]
        total = np.sum(vectors, axis=0)
        expected = start + 0.8 * np.mean(lengths) * total / np.sqrt(np.sum(total**2))
        np.testing.assert_allclose(out[name].values, expected, rtol=1e-6, atol=1e-6)


def test_it_is_listed_and_explained(package):
    assert "norm_keeping" in run(package, "methods").stdout
    explained = run(package, "methods", "norm_keeping").stdout
    assert "as long as they are on average" in explained
    assert "strength" in explained


def test_its_parameters_are_checked(package, tmp_path):
    result = run(package, "merge", "base", "a", "-o", "out", "--method", "norm_keeping", "--set", "strength=-1")
    assert result.returncode == 1
    assert "norm_keeping.strength: parameter: got -1, expected a finite number of at least 0" in result.stderr


@pytest.mark.parametrize(
    ("code", "value", "message"),
    [
        ("import no_such_module", "norm_keeping:NormKeeping", "a merge method that cannot be loaded"),
        ("NormKeeping = 3", "norm_keeping:NormKeeping", "announces something that is no merge method"),
        ("", "norm_keeping:NormKeeping", "a merge method that cannot be loaded"),
    ],
    ids=["import error", "no method", "missing"],
)
def test_a_broken_package_is_named_when_a_method_is_looked_up(tmp_path, code, value, message):
    install(tmp_path / "site", code, value=value)
    result = run(tmp_path / "site", "merge", "base", "a", "-o", "out", "--method", "unknown")
    assert result.returncode == 1
    assert message in result.stderr
    assert "norm_keeping" in result.stderr
    # Methods of this package are found without it.
    result = run(tmp_path / "site", "merge", tmp_path / "none", tmp_path / "none", "-o", "out", "--method", "metagpt")
    assert "norm_keeping" not in result.stderr


def test_methods_of_this_package_win(tmp_path):
    code = block("python").replace('"norm_keeping"', '"linear"')
    install(tmp_path / "site", code)
    explained = run(tmp_path / "site", "methods", "linear").stdout
    assert "Model soups" in explained
    assert "as long as they are on average" not in explained
