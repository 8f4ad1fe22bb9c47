"""The example of README's evidence: it runs, through the real command, and its tables are those of its results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .tools import ROOT

EXAMPLE = ROOT / "examples" / "tiny_gpt"
TASKS = {"code", "prose", "names"}


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a run of a few steps and merges gives."""
    path = tmp_path_factory.mktemp("tiny_gpt") / "results.json"
    run("run.py", "--smoke", "--seeds", 1, "--jobs", 1, "--out", path)
    return path


def test_a_few_steps(results):
    content = json.loads(results.read_text())
    (seed,) = content["seeds"]
    assert set(seed["families"]) == {"equal", "unequal"}
    for family in seed["families"].values():
        assert {merge["family"] for merge in family["merges"]} == {"average", "task arithmetic", "TIES", "MetaGPT"}
        own = [family["models"][task][task] for task in TASKS]
        for merge in family["merges"]:
            assert set(merge["losses"]) == TASKS
            difference = sum(merge["losses"].values()) / 3 - sum(own) / 3
            assert merge["ald"] == pytest.approx(difference, abs=1e-6)
        by_name = {merge["name"]: merge for merge in family["merges"]}
        squares = [norm**2 for norm in family["norms"]]
        expected = [square / sum(squares) for square in squares]
        assert by_name["MetaGPT, model, p = 2"]["coefficients"] == pytest.approx(expected)
        bounds = {name: merge["bound"] for name, merge in by_name.items() if "bound" in merge}
        assert min(bounds, key=bounds.get) == "MetaGPT, model, p = 2"
        for errors in family["linearity"].values():
            assert 0 < errors["0.1"] < errors["1.0"] < 1


def test_tables_of_a_run(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    code = (
        f"import sys, json; sys.path.insert(0, {str(EXAMPLE)!r}); import report; from pathlib import Path\n"
        f"report.write_readme(Path({str(readme)!r}), report.tables(json.loads(Path({str(results)!r}).read_text())))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n1 seeds; ")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "| MetaGPT, model, p = 2 |" in text


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    picture = tmp_path / "results.svg"
    run("report.py", "--results", results, "--readme", tmp_path / "README.md", "--plot", picture)
    assert "</svg>" in picture.read_text()


def test_the_tables_in_readme_are_those_of_the_committed_results(tmp_path):
    code = (
        f"import sys, json; sys.path.insert(0, {str(EXAMPLE)!r}); import report; from pathlib import Path\n"
        f"print(report.tables(json.loads(Path({str(EXAMPLE / 'results.json')!r}).read_text())))"
    )
    tables = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert tables in (EXAMPLE / "README.md").read_text(encoding="utf-8")
