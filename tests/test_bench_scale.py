"""bench_scale: its points, the lines through them, sparse models, and one real sweep of tiny merges. No timing."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import pytest

from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import BF16

from .tools import ROOT

sys.path.append(str(ROOT / "bench"))  # behind everything else: its names are plain

import bench_scale
from benchlib.fits import SWEEPS, Line, scale_series
from benchlib.rows import Row, Spread
from benchlib.scale_table import scale_tables
from benchlib.shapes import REAL_LLAMAS, TensorGrid, num_parameters, write_sparse_model

GB = 10**9


def test_points_are_on_their_line():
    line = Line.through([(x, 0.25 + 3.0 * x) for x in (0.1, 1.0, 10.0, 1000.0)])
    assert line.slope == pytest.approx(3.0, rel=1e-9)
    assert line.constant == pytest.approx(0.25, rel=1e-9)
    assert line.residual < 1e-9
    assert line.at(2.0) == pytest.approx(6.25)


def test_line_minimises_relative_deviations():
    points = [(0.0, 1.0), (1.0, 2.5), (10.0, 19.0), (100.0, 230.0)]
    line = Line.through(points)

    def loss(constant: float, slope: float) -> float:
        return sum(((constant + slope * x) / y - 1) ** 2 for x, y in points)

    least = loss(line.constant, line.slope)
    for constant, slope in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3)):
        assert loss(line.constant + constant, line.slope + slope) > least
    assert line.residual == max(abs(y - line.at(x)) / y for x, y in points)


def test_a_line_needs_three_points():
    rows = [scale_row(num_shards=n, seconds=1.0 + n) for n in (1, 4)]
    (series,) = scale_series(rows)
    assert series.line("seconds") is None
    (series,) = scale_series([*rows, scale_row(num_shards=16, seconds=17.0)])
    assert series.line("seconds").slope == pytest.approx(1.0)
    assert series.points("seconds") == [(1, 2.0), (4, 5.0), (16, 17.0)]


def scale_row(*, seconds: float, num_shards: int = 1, task: str = "dry run") -> Row:
    facts = {"sweep": "shards", "task": task, "num_parameters": 10**8, "num_models": 3, "num_tensors": 1024}
    metrics = {"seconds": Spread.of([seconds]), "peak_anonymous_mb": Spread.of([30.0])}
    metrics |= {"user_seconds": Spread.of([2 * seconds]), "system_seconds": Spread.of([0.5])}
    return Row("scale", f"shards, {num_shards}: {task}", {**facts, "num_shards": num_shards}, metrics)


def test_table_has_lines_points_and_plans():
    facts = {"sweep": "llama", "num_models": 3, "num_shards": 30, "num_parameters": 70_553_706_496, "num_tensors": 723}
    facts |= {"nbytes_measured": 5 * 10**11, "nbytes_combined": 5 * 10**11, "nbytes_written": 141 * GB}
    metrics = {name: Spread.of([0.5]) for name in ("seconds", "peak_anonymous_mb", "peak_resident_mb")}
    llama = Row("scale", "llama 70B: dry run", facts, metrics)
    text = scale_tables([*(scale_row(num_shards=n, seconds=1.0 + n) for n in (1, 4, 16)), llama])
    assert (
        "| dry run, x shards | 1 + 1·x s, within 1 % | 2.5 + 2·x s, within 1 % | 30 + 0·x MB, within 1 % |  |" in text
    )
    assert "| shards: dry run | 0.10 B | 3 | 1024 | 4 | 5.00 | 30.0 |  |" in text
    assert "| llama 70B | 70.6 B | 723 | 30 | 0.500 | 0.500 | 0.500 | 1.00 TB | 0.141 TB |" in text
    assert scale_tables([]) == ""


def test_sweeps_change_one_thing_and_fit_the_disk():
    for sweep in SWEEPS:
        points = bench_scale.points_of(sweep, 8 * GB)
        assert points
        assert all(point.nbytes <= 8 * GB for point in points)
    sizes = [num_parameters(point.shape) for point in bench_scale.points_of("parameters", 10**15)]
    assert sizes[0] < 0.12e9
    assert all(1.4 < b / a < 2.3 for a, b in pairwise(sizes))
    assert len(bench_scale.points_of("parameters", 4 * GB)) < len(bench_scale.points_of("parameters", 8 * GB))
    counts = [len(point.shape.tensors(BF16)) for point in bench_scale.points_of("tensors", 8 * GB)]
    assert counts == [10, 100, 1000, 10_000, 50_000]
    assert len({num_parameters(point.shape) for point in bench_scale.points_of("tensors", 8 * GB)}) == 1
    assert bench_scale.points_of("models", 8 * GB)[0].counts == (1, 2, 4, 8, 16)


@pytest.mark.parametrize(("name", "billions", "num_tensors"), [("70B", 70.55, 723), ("405B", 405.85, 1137)])
def test_sparse_models_of_real_shape(tmp_path, name, billions, num_tensors):
    num_shards = write_sparse_model(tmp_path / name, REAL_LLAMAS[name], 5 * GB)
    checkpoint = open_checkpoint(tmp_path / name)
    assert len(checkpoint.tensors) == num_tensors
    assert sum(source.numel for source in checkpoint.tensors.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert len(checkpoint.shards) == num_shards
    assert max(shard.nbytes for shard in checkpoint.shards) <= 5 * GB
    assert sum(path.stat().st_blocks for path in (tmp_path / name).iterdir()) * 512 < 8 << 20


def test_shards_are_as_many_as_asked_for(tmp_path):
    for point, wanted in zip(bench_scale.points_of("shards", 8 * GB), (1, 4, 16, 64, 256), strict=True):
        assert write_sparse_model(tmp_path / str(wanted), point.shape, point.max_shard_nbytes) == wanted


def test_a_point_is_measured(tmp_path):
    point = bench_scale.Point("models", TensorGrid(12, 16, 16), (1, 2), max_shard_nbytes=4096 + 6 * 640)
    rows = bench_scale.measure_point(point, tmp_path, 1, lambda line: None)
    assert [row.name for row in rows] == [
        f"models, {count}: {task}" for count in (1, 2) for task in ("merge, model", "merge, layer", "dry run")
    ]
    for row in rows:
        assert row.metrics["seconds"].n == 1
        assert row.metrics["peak_anonymous_mb"].median > 1
        assert (row.parameters["num_parameters"], row.parameters["num_tensors"]) == (12 * 256, 12)
        assert row.parameters["num_shards"] == 2
    # Base and models twice, respectively once, and one model written; headers are no part of it.
    assert [row.nbytes / (12 * 512) for row in rows] == [2 * 2 + 1, 2 + 1, 0, 2 * 3 + 1, 3 + 1, 0]
    assert json.loads(json.dumps(rows[0].to_dict()))["suite"] == "scale"


def test_a_disk_that_is_too_small_is_said_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scale, "free_nbytes", lambda folder: 10**6)
    command = [sys.executable, str(ROOT / "bench" / "bench_scale.py"), "--disk", "1KB", "--sweep", "models"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""  # no point fits
    with pytest.raises(bench_scale.click.ClickException, match=r"too little space: got 0.0 GB free"):
        bench_scale.collect(folder=tmp_path, sweeps=("models",), max_nbytes=8 * GB)
    assert not list(tmp_path.iterdir())
