"""bench_methods: its recipes, and how it runs and compares; on programs that do nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from metagpt_fast.family import PRESETS, make_family
from metagpt_fast.methods import METHODS

from .tools import ROOT

sys.path.append(str(ROOT / "bench"))  # behind everything else: its names are plain

import bench_methods
from benchlib.method_recipes import METHOD_RECIPES
from benchlib.processes import ProcessError, Usage
from make_family import BenchFamily


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    preset = PRESETS["tiny"]
    folder = tmp_path_factory.mktemp("bench") / "family"
    made = make_family(folder, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=5)
    return BenchFamily(made.base, made.models, made.num_parameters)


@pytest.fixture
def bench(family, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_methods, "_OURS", (sys.executable, "-c", "import sys; assert sys.argv[-1] == '--no-sync'")
    )
    return bench_methods.MethodBench(family, tmp_path, "bfloat16", lambda line: None)


def program(folder: Path, text: str) -> str:
    path = folder / "mergekit-yaml"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_rows_and_speedups(bench, tmp_path):
    # It is given the recipe, the output and its options.
    peer = program(tmp_path, "import sys; assert open(sys.argv[1]).read().startswith('merge_method: ties')")
    rows = bench.measure("ties", 3, peer, ("default", "fast"))
    assert [row.name for row in rows] == ["ties", "mergekit: ties", "mergekit, fast options: ties"]
    ours, default, _ = rows
    assert ours.metrics["seconds"].n == 3
    assert default.metrics["seconds"].n == 1  # slow there: once
    for name in ("speedup_mergekit", "speedup_mergekit_fast"):
        assert ours.metrics[name].n == 3
        assert ours.metrics[name].median > 0
    assert "speedup_mergekit" not in default.metrics
    assert ours.metrics["percent_cached"].min == 100


def test_without_mergekit_there_is_no_speedup(bench):
    (row,) = bench.measure("linear", 1, None, ("default",))
    assert "speedup_mergekit" not in row.metrics


def test_ratios_are_taken_within_a_round():
    def usages(*seconds: float) -> list[Usage]:
        return [Usage(each, 0, 0, None, None) for each in seconds]

    assert bench_methods.speedups(usages(1, 2, 4), usages(10, 20)) == [10, 10, 5]


def test_a_method_that_fails_leaves_the_others(family, monkeypatch):
    monkeypatch.setattr(bench_methods, "get_family", lambda *arguments, **settings: family)
    code = "import sys; sys.exit('ties' in sys.argv[1])"
    monkeypatch.setattr(bench_methods, "_OURS", (sys.executable, "-c", code))
    lines: list[str] = []
    rows = bench_methods.collect(methods=("ties", "linear"), num_rounds=1, tell=lines.append)
    assert [row.name for row in rows] == ["linear"]
    assert any(line.startswith("ties: exit status 1") for line in lines)
    with pytest.raises(ProcessError, match="ties: exit status 1"):
        bench_methods.collect(methods=("ties",), num_rounds=1, tell=lines.append)


def test_unknown_methods_are_refused():
    done = CliRunner().invoke(bench_methods.main, ["--method", "tise"])
    assert done.exit_code == 2
    assert "'sce'" in done.output


def test_every_method_that_mergekit_has_too_is_measured():
    assert METHOD_RECIPES.keys() >= METHODS.keys() - {"metagpt"}


@pytest.mark.filterwarnings("ignore")  # what others deprecate in it
@pytest.mark.parametrize("method", METHOD_RECIPES)
def test_mergekit_takes_the_recipes(family, method):
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]' compares with mergekit")
    import yaml
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration

    for dtype in ("bfloat16", "float32"):
        recipe = yaml.safe_load(METHOD_RECIPES[method].text(method, family, dtype))
        MergeConfiguration.model_validate(recipe)
        spec = merge_methods.get(method).spec
        shared, of_models = recipe.get("parameters", {}), recipe["models"][0].get("parameters", {})
        assert set(shared) | set(of_models) <= {parameter.name for parameter in spec.parameters}
        assert {parameter.name for parameter in spec.parameters if parameter.required} <= set(shared) | set(of_models)
