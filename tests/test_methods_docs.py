"""docs/methods.md: a section for every method, with the parameters and defaults that the class has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metagpt_fast.methods import METHODS
from metagpt_fast.methods.pruning import PruningMethod

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
COMMON = SECTIONS["What the methods that prune have in common"]


def documented(section):
    """Return (default, required, per model) by parameter, from a section's table."""
    parameters = {}
    for name, default, meaning in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE):
        value, _, required = default.partition(", ")
        parameters[name] = (value.strip("`"), required == "required", "per model" in meaning)
    return parameters


def text_of(default):
    if default is None:
        return "none"
    return (
        str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
    )


def test_every_method_has_a_section_in_the_order_of_the_list():
    named = [heading for heading in SECTIONS if heading in METHODS]
    assert named == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_those_of_the_class(name):
    found = documented(SECTIONS[name])
    if issubclass(METHODS[name], PruningMethod):
        found = documented(COMMON) | found
    expected = {
        spec.name: (str(text_of(spec.default)), spec.required, spec.per_model)
        for spec in METHODS[name].specs().values()
    }
    assert {key: (float_text(value), *rest) for key, (value, *rest) in found.items()} == {
        key: (float_text(value), *rest) for key, (value, *rest) in expected.items()
    }


def float_text(text):
    """Return a number in one spelling: 1e-5 and 1e-05 are the same."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


@pytest.mark.parametrize("name", METHODS)
def test_papers_of_the_docstring_are_cited(name):
    """A paper that a class names is linked from its section, or from another's."""
    for paper in re.findall(r"\b\d{4}\.\d{5}\b", METHODS[name].__doc__ or ""):
        assert f"https://arxiv.org/abs/{paper}" in PAGE
