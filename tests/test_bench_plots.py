"""The pictures of README and docs are what bench/plots.py makes of the committed results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from .tools import ROOT

sys.path.append(str(ROOT / "bench"))  # behind everything else: its names are plain

import plots
from benchlib.figures import load_sources, provenance
from benchlib.rows import Result, Row, Spread

IMAGES = ROOT / "docs" / "images"
NAMES = sorted(plots.FIGURES)


def drawn_by(svg: str) -> str:
    return re.search(r"Matplotlib v([\d.]+)", svg).group(1)


def test_every_picture_is_there_and_shown():
    assert sorted(path.name for path in IMAGES.iterdir()) == [f"{name}.svg" for name in NAMES]
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"(images/{name}.svg)" in text for name in NAMES)
    assert '"docs/images/merges.svg"' in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_from_the_committed_results(name):
    """Also where matplotlib is not installed: a result that is replaced takes its pictures with it."""
    sources = plots.sources_of(name, load_sources(plots.PUBLISHED))
    svg = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert provenance(sources) in svg, "run: python bench/plots.py"


def test_pictures_are_regenerated_not_edited(tmp_path):
    try:
        installed = version("matplotlib")
    except PackageNotFoundError:
        pytest.skip("matplotlib is not installed")
    committed = {name: (IMAGES / f"{name}.svg").read_text(encoding="utf-8") for name in NAMES}
    if {installed} != {drawn_by(svg) for svg in committed.values()}:
        pytest.skip(f"matplotlib {installed} does not draw the same bytes as the version that drew them")
    command = [sys.executable, str(ROOT / "bench" / "plots.py"), "--out", str(tmp_path / "images")]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "config"), "PYTHONWARNINGS": ""}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
    for name, svg in committed.items():
        assert (tmp_path / "images" / f"{name}.svg").read_text(encoding="utf-8") == svg, "run: python bench/plots.py"


@pytest.mark.parametrize(
    ("kernel", "num_models", "itemsize", "flops", "nbytes"),
    [
        # Per element. gram, T = 1: one difference; θ₀², θ₀τ, τ² each multiplied and added.
        ("layer_gram", 1, 2, 1 + 3 * 2, 2 * 2),
        ("layer_gram", 3, 4, 3 + 10 * 2, 4 * 4),
        # merge, T = 1: one difference, one product, one sum; base and model read, the output written.
        ("layer_merge", 1, 2, 1 + 2, 3 * 2),
        ("layer_merge", 8, 4, 8 + 16, 10 * 4),
    ],
)
def test_arithmetic_intensity(kernel, num_models, itemsize, flops, nbytes):
    assert plots.flops_per_byte(kernel, num_models, itemsize) == pytest.approx(flops / nbytes)


def test_the_last_file_counts(tmp_path):
    for name, seconds in (("b", 1.0), ("a", 2.0)):
        row = Row("merge", "x", {"cache": "warm"}, {"seconds": Spread.of([seconds])})
        Result("2026-01-02", "0123", {}, {}, {}, (row,)).save(tmp_path / f"{name}.json")
    (source,) = load_sources([tmp_path / "b.json", tmp_path / "a.json"])
    assert source.row.metrics["seconds"].median == 2.0
    assert "from a.json, sha256" in provenance([source])
