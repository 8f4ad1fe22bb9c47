"""The page of a measurement: right numbers, nothing from a network, and names from checkpoints that do no harm."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, F32
from metagpt_fast.page import measurement_page, save_page
from metagpt_fast.page.charts import SizeScale, cosine_class
from metagpt_fast.page.numbers import MAX_COLUMNS, MAX_MODULES, page_numbers, relative

from .checkpoints import random_states, write_family
from .pages import Page, make_measurement, random_measurement
from .test_model_card import HOSTILE

TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body main header section footer h1 h2 p ul li bdi span div i table thead tbody tr "
        "th td svg g rect details summary",
    )
)


def squares(*values):
    """Gram matrices with these diagonals, and nothing beside them."""
    return np.array([np.diag(row) for row in values], np.float64)


def rows_of(page, heading):
    """The texts of the table rows in a section, cell by cell, as far as the parser can tell."""
    section = next(text for text in page.texts["section"] if text.startswith(heading))
    return section


def test_sums_by_layer_and_module():
    names = ["embed", "a.0.q.weight", "a.0.k.weight", "a.1.q.weight", "a.10.q.weight", "a.2.mlp.3.w", "a.2.mlp.4.w"]
    values = [[1, 1], [4, 1], [9, 2], [16, 3], [25, 4], [36, 5], [0, 6]]
    numbers = page_numbers(make_measurement(names, squares(*values)))
    assert [column.label for column in numbers.columns] == ["0", "1", "2", "10"]
    assert numbers.modules == ("q", "k", "mlp.*.w")
    np.testing.assert_array_equal(numbers.column_gram[:, 0, 0], [13, 16, 36, 25])
    np.testing.assert_array_equal(numbers.column_gram[:, 1, 1], [3, 3, 11, 4])
    nan = np.nan
    expected = [[1, 3, nan, 4], [2, nan, nan, nan], [nan, nan, 11, nan]]
    np.testing.assert_array_equal(numbers.cell_squares[:, :, 1], expected)
    np.testing.assert_array_equal(numbers.module_squares, [[45, 8], [9, 2], [36, 11]])
    assert numbers.outside == (0,)
    np.testing.assert_allclose(relative(numbers.module_squares)[:, 0], np.sqrt([8 / 45, 2 / 9, 11 / 36]))


def test_the_sums_are_those_of_the_measurement():
    measurement = random_measurement(3, 5)
    numbers = page_numbers(measurement)
    inside = [row for row in range(len(measurement.names)) if row not in numbers.outside]
    assert [measurement.names[row] for row in numbers.outside] == [measurement.names[i] for i in (0, -2, -1)]
    total = measurement.gram[inside].sum(axis=0)
    np.testing.assert_allclose(numbers.column_gram.sum(axis=0), total, rtol=1e-12)
    np.testing.assert_allclose(numbers.module_squares.sum(axis=0), np.diagonal(total), rtol=1e-12)


def test_unchanged_tensors():
    names = ["a.0.x", "a.0.y", "a.1.x", "a.1.empty", "head"]
    values = [[1, 0, 1], [1, 0, 0], [1, 2, 0], [0, 0, 0], [0, 0, 0]]
    measurement = make_measurement(names, squares(*values), numels=[4, 4, 4, 0, 4])
    numbers = page_numbers(measurement)
    assert numbers.unchanged == ("a.0.y", "head")
    assert numbers.num_changed.tolist() == [1, 1]
    page = Page(measurement_page(measurement))
    section = rows_of(page, "Tensors that no model changed")
    assert "2 of 5 tensors" in section
    assert section.endswith("a.0.yhead")
    assert "m1 changed 1 of 4 tensors" in rows_of(page, "Before you merge")
    everything = Page(measurement_page(random_measurement(2, 3)))
    assert "every tensor was changed" in rows_of(everything, "Tensors that no model changed")


def test_numbers_on_the_page():
    measurement = random_measurement(3, 6, labels=["chat", "math", "code"])
    page = Page(measurement_page(measurement))
    models = rows_of(page, "Models")
    for t, label in enumerate(measurement.labels):
        assert label in models
        assert f"{measurement.coefficients()[t]:.4f}" in models
        assert f"{measurement.norms[t]:#.4g}" in models
    cosines = rows_of(page, "Cosines between")
    for i, j in ((1, 0), (2, 0), (2, 1)):
        assert f"{measurement.cosines[i, j]:.3f}" in cosines
    numbers = page_numbers(measurement)
    norms = np.sqrt(np.diagonal(numbers.column_gram, axis1=1, axis2=2))
    titles = [text for text in page.texts["title"] if text.startswith("model.layers.5: ")]
    for t in range(3):
        assert f"model.layers.5: {norms[5, t + 1]:#.3g}" in titles
    share = norms[5, 1:] ** 2 / (norms[5, 1:] ** 2).sum()
    assert f"model.layers.5: {share[2]:.3f}" in titles
    assert all(warning in rows_of(page, "Before you merge") for warning in measurement.warnings())


def test_warnings_in_words():
    gram = np.array([[[100, 0, 0, 0], [0, 4, 3.9, 0], [0, 3.9, 4, 0], [0, 0, 0, 0]]])
    text = rows_of(Page(measurement_page(make_measurement(["w"], gram))), "Before you merge")
    assert "m3 equals the base" in text
    assert "m1 and m2 are far from orthogonal" in text
    quiet = measurement_page(make_measurement(["w"], squares([100, 1, 1])))
    assert "Nothing to warn of" in rows_of(Page(quiet), "Before you merge")
    one_layer = np.array([squares([100, 1, 1])[0]] * 9 + [[[100, 0, 0], [0, 1, 0.5], [0, 0.5, 1]]])
    text = rows_of(Page(measurement_page(make_measurement([f"l.{i}.w" for i in range(10)], one_layer))), "Before you")
    assert "m1 and m2 have a cosine of 0.50 in l.9, though of 0.05 over the whole model" in text


@pytest.mark.parametrize("num_models, num_layers", [(1, 1), (1, 0), (2, 3), (16, 200), (3, 1000)])
def test_every_size(num_models, num_layers):
    text = measurement_page(random_measurement(num_models, num_layers))
    page = Page(text)
    assert page.tags() <= TAGS
    assert len(text) < 8 << 20
    names = ["NaN", "nan", "inf", "undefined"]
    assert not any(re.search(rf"\b{name}\b", text) for name in names)
    num_maps = sum(tag == "details" for tag, _ in page.elements)
    assert num_maps >= (num_models if num_layers else 0)
    if num_layers > MAX_COLUMNS:
        assert "model.layers.0–2: " in text


def test_many_kinds_of_tensors():
    names = [f"layers.{i % 4}.kind{i}.weight" for i in range(400)] + [f"x{i}.0.w" for i in range(900)]
    measurement = make_measurement(names, squares(*([1, 1] for _ in names)))
    numbers = page_numbers(measurement)
    assert (len(numbers.modules), numbers.modules[-1]) == (MAX_MODULES, f"{401 - MAX_MODULES + 1} other modules")
    assert len(numbers.columns) <= MAX_COLUMNS
    assert np.nansum(numbers.cell_squares[:, :, 1]) == len(names)
    Page(measurement_page(measurement))


def test_zeros_everywhere():
    measurement = make_measurement(["a.0.w", "a.1.w", "b"], squares([0, 0, 1e-300], [0, 0, 0], [1, 0, 0]))
    page = Page(measurement_page(measurement))
    assert "–" in rows_of(page, "Change by module and layer")
    assert page.with_class("zero")


def assert_harmless(text):
    page = Page(text)
    assert page.tags() <= TAGS
    assert page.tags() >= {"main", "table"}
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name in {"href", "src", "action"}}, tag
    assert not re.search(r"url\(|@import|https?:", page.texts["style"][0])
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.count("\n") == 2
    text.encode()
    return page


@pytest.mark.parametrize(
    "name", [*HOSTILE, "</style><script>alert(1)</script>", "'\" onload=alert(1) x='", "x" * 70_000]
)
def test_hostile_names_do_no_harm(name):
    names = [f"{name}", f"{name}.0.{name}", f"layers.0.{name}", f"{name}.1.b", "same"]
    gram = squares(*([4, 1, 1] for _ in names[:-1]), [4, 0, 0])
    labels = (f"{name}1", f"{name}2")
    measurement = make_measurement([*names[:-1], f"same{name}"], gram, labels=labels, base=f"/home/alice/models/{name}")
    text = measurement_page(measurement)
    assert_harmless(text)
    assert "alice" not in text
    assert len(text) < 100_000


def test_what_a_browser_may_load():
    text = measurement_page(random_measurement(2, 2))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in text


def test_size_scale():
    scale = SizeScale.of([0.0, float("nan"), 1e-9, 0.01, 1.0])
    assert (scale.low, scale.high) == (1e-3, 1.0)
    assert [scale.step(value) for value in (1e-9, 1e-3, 1.01e-3, 0.1, 0.999, 1.0)] == [0, 0, 0, 6, 9, 9]
    assert SizeScale.of([2.0, 2.0]).low == 0.2
    assert SizeScale.of([0.0]) is None


@pytest.mark.parametrize("value, name", [(0, "d0"), (-0.04, "d0"), (0.05, "p1"), (-0.3, "n4"), (1, "p5"), (-0.7, "n5")])
def test_cosine_class(value, name):
    assert cosine_class(value) == name


SHAPES = {"layers.0.a": (8, 6), "layers.1.a": (8, 6), "norm": (6,)}


@pytest.fixture
def family(tmp_path):
    base, models = write_family(tmp_path / "in", random_states(5, [(BF16,), (BF16,), (F32,)], SHAPES))
    return [str(path) for path in (base, *models)]


def invoke(*arguments):
    return CliRunner().invoke(cli, [*arguments, "--quiet"])


def test_measure_writes_it(family, tmp_path):
    result = invoke("measure", *family, "--html", str(tmp_path / "p.html"))
    assert result.exit_code == 0, result.output
    assert "p.html" in result.stdout
    text = (tmp_path / "p.html").read_text()
    assert text == measurement_page(mf.measure(family[0], family[1:]))
    assert_harmless(text)


def test_merge_writes_it_and_says_so(family, tmp_path):
    out = tmp_path / "out"
    arguments = ["merge", *family, "-o", str(out), "--exponent", "1"]
    result = invoke(*arguments, "--html", str(out / "page.html"))
    assert result.exit_code == 0, result.output
    assert f"page        {out / 'page.html'}" in result.stdout
    page = Page((out / "page.html").read_text())
    record = json.loads((out / "metagpt_fast.json").read_text())
    assert "measurement" not in record
    models = rows_of(page, "Models")
    assert "λ in this merge" in models
    assert all(f"{value:.4f}" in models for value in record["coefficients"][0])
    assert "p = 1.0" in models
    saved = tmp_path / "m.json"
    for name in ("made", "used"):
        path = tmp_path / f"{name}.html"
        arguments = ["merge", *family, "-o", str(tmp_path / name), "--measurement", str(saved), "--html", str(path)]
        assert invoke(*arguments, "--granularity", "layer").exit_code == 0
    assert (tmp_path / "made.html").read_text() == (tmp_path / "used.html").read_text()
    assert "the mean over 3 scopes" in (tmp_path / "used.html").read_text()


def test_a_method_that_measures_nothing(family, tmp_path):
    result = invoke("merge", *family, "-o", str(tmp_path / "out"), "--method", "linear", "--html", str(tmp_path / "p"))
    assert result.exit_code == 1
    assert "linear, which measures no norms" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["measure", "merge"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(family, tmp_path, monkeypatch, command):
    monkeypatch.setattr(f"metagpt_fast.merging.{command}", lambda *a, **k: pytest.fail("it has begun"))
    (tmp_path / "notes.html").write_text("<p>mine")
    out = ["-o", str(tmp_path / "out")] if command == "merge" else []
    for path in (tmp_path / "notes.html", tmp_path, tmp_path / "none" / "p.html", family[0] + "/config.json"):
        result = invoke(command, *family, *out, "--html", str(path))
        assert result.exit_code == 1
        assert "cannot write the page" in result.stderr
    assert (tmp_path / "notes.html").read_text() == "<p>mine"


def test_only_a_page_or_an_empty_file_is_replaced(tmp_path):
    measurement = random_measurement(1, 1)
    path = tmp_path / "p.html"
    path.touch()
    mf.save_page(measurement, path)
    first = path.read_bytes()
    save_page(random_measurement(2, 1), path)
    assert path.read_bytes() != first
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(mf.OutputError, match="not a page"):
        save_page(measurement, tmp_path / "pipe")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.html", "pipe"]


def test_a_dry_run_refuses_it_too(family, tmp_path):
    result = invoke("merge", *family, "-o", str(tmp_path / "out"), "--dry-run", "--html", str(tmp_path / "no" / "p"))
    assert result.exit_code == 1
    assert "make the folder first" in result.stderr


def test_a_page_inside_the_output(family, tmp_path):
    """It does not stand in the way of another merge, nor of verifying this one."""
    out = tmp_path / "out"
    for _ in range(2):
        result = invoke("merge", *family, "-o", str(out), "--overwrite", "--html", str(out / "page.html"))
        assert result.exit_code == 0, result.output
    assert invoke("verify", str(out)).exit_code == 0
