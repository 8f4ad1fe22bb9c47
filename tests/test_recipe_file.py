"""Recipes as text: what is accepted, what is refused and in which line, and what hostile files come to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_fast.dtypes import BF16, F32
from metagpt_fast.errors import RecipeError
from metagpt_fast.recipe_file import Entry, load_recipe
from metagpt_fast.recipe_yaml import MAX_DEPTH, MAX_NBYTES, MAX_NODES, parse_yaml, read_text

from .recipes import load, write_recipe

HEAD = "merge_method: ties\nbase_model: base\n"
MODELS = "models: [{model: a}, {model: b}]\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    return caught.value


def test_a_whole_recipe(tmp_path):
    recipe = load(
        tmp_path,
        """# a comment
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: [0, 1]
      density:
        - filter: mlp
          value: [0.5, 1e-5]
        - value: 1
  - model: ./b
    parameters: {weight: {filter: x, value: 2}}
  - model: base
parameters: {lambda: 2, granularity: layer}
exponent: 3
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: base
""",
    )
    assert recipe.merge_method == "ties"
    assert [str(path) for path in recipe.models] == ["a", "b", "base"]
    assert recipe.base == 2
    (only,) = recipe.slices
    assert [source.model for source in only.sources] == [0, 1, 2]
    assert [source.line for source in only.sources] == [5, 12, 14]
    assert only.base == 2
    assert not recipe.is_sliced
    first, second, base = (source.parameters for source in only.sources)
    assert first["weight"].entries == (Entry((0, 1), True, None, 7),)
    assert first["density"].entries == (Entry((0.5, "1e-5"), True, "mlp", 9), Entry((1,), False, None, 11))
    assert second["weight"].entries == (Entry((2,), False, "x", 13),)
    assert not base
    assert list(recipe.parameters) == ["lambda", "exponent"]
    assert recipe.granularity == "layer"
    assert (recipe.dtype, recipe.out_dtype) == (F32, BF16)
    assert recipe.wants_base_tokenizer
    assert recipe.where_of("dtype") == "recipe.yaml:17"
    assert recipe.where_of("slices") == "recipe.yaml"
    assert recipe.text.startswith("# a comment")


def test_slices(tmp_path):
    recipe = load(
        tmp_path,
        """merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [2, 6], parameters: {weight: 2}}
    base_model: c
  - sources: [{model: a, layer_range: [1, 2]}]
    parameters: {normalize: no}
""",
    )
    first, second = recipe.slices
    assert [(source.model, source.layers) for source in first.sources] == [(0, (0, 4)), (1, (2, 6))]
    assert [str(path) for path in recipe.models] == ["a", "b", "c"]
    assert (first.base, second.base, recipe.base) == (2, None, None)
    assert second.parameters["normalize"].entries[0].values == (False,)
    assert (first.line, second.line) == (3, 7)
    assert recipe.is_sliced


def test_the_base_of_a_slice_is_the_top_levels_without_its_own(tmp_path):
    a, b = (f"sources: [{{model: {name}, layer_range: [0, 1]}}]" for name in "ab")
    recipe = load(tmp_path, HEAD + f"slices: [{{{a}}}, {{base_model: b, {b}}}]")
    assert [str(recipe.models[each.base]) for each in recipe.slices] == ["base", "b"]


def test_two_paths_of_one_folder_are_one_model(tmp_path):
    write_recipe(tmp_path, "")
    (tmp_path / "link").symlink_to("base")
    recipe = load(tmp_path, HEAD + f"models: [{{model: a}}, {{model: link}}, {{model: {tmp_path / 'c'}}}]\n")
    assert [str(path) for path in recipe.models] == ["a", "link", str(tmp_path / "c")]
    assert recipe.base == 1


def test_what_is_there_is_a_path_whatever_it_is_called(tmp_path):
    write_recipe(tmp_path, "", ["x+y", "x@y", "2024-01-01"])
    recipe = load(tmp_path, "merge_method: linear\nmodels: [{model: x+y}, {model: x@y}, {model: 2024-01-01}]")
    assert [str(path) for path in recipe.models] == ["x+y", "x@y", "2024-01-01"]


@pytest.mark.parametrize(
    ("text", "coefficients"),
    [
        ("coefficients: [1, 2e-3, '0.5']", (1, 0.002, 0.5)),
        ("coefficients: 0.3", (0.3,)),
        ("parameters: {coefficients: [1, 2]}", (1, 2)),
        ("coefficients: metagpt", None),
        ("parameters: {coefficients: metagpt}", None),
    ],
)
def test_coefficients(tmp_path, text, coefficients):
    recipe = load(tmp_path, HEAD + MODELS + text)
    assert recipe.coefficients == coefficients
    assert ("coefficients" in recipe.parameters) == (coefficients is None)


def test_keys_without_values_and_aliases(tmp_path):
    recipe = load(
        tmp_path,
        HEAD
        + "models: [{model: a, parameters: &p {weight: 1}}, {model: b, parameters: *p}, {model: c, parameters: }]\n"
        + "dtype:\nparameters:\nslices: ~\n",
    )
    assert [list(source.parameters) for source in recipe.slices[0].sources] == [["weight"], ["weight"], []]


KEYS = (
    "merge_method, base_model, models, slices, parameters, dtype, out_dtype, tokenizer_source, granularity, exponent, "
    "coefficients, coefficients_from"
)
SOURCE = "slices: [{sources: [{model: a, layer_range: %s}]}]"
REFUSED = [
    # text after HEAD, line, parts of the message
    (MODELS + "out_dtpye: x", 4, ["unknown key 'out_dtpye'", f"one of {KEYS}", "did you mean out_dtype?"]),
    (MODELS + "density: 1", 4, ["unknown key 'density'", "put density under parameters:"]),
    (
        "models:\n- model: a\n\n  weight: 1",
        6,
        ["unknown key 'weight'", "one of model, parameters", "under parameters:"],
    ),
    ("models: [{model: a, parameters: {w: {valeu: 1}}}]", 3, ["unknown key 'valeu'", "did you mean value?"]),
    (MODELS + "modules: {}", 4, ["modules is not supported"]),
    (MODELS + "tokenizer: {source: union}", 4, ["tokenizer is not supported", "tokenizer_source: base"]),
    (MODELS + "tokenizer_source: union", 4, ["tokenizer_source cannot be used", "got 'union'", "expected base"]),
    (MODELS + "chat_template: auto", 4, ["chat_template is not supported"]),
    ("slices:\n- sources: [{model: a, layer_range: [0, 1]}]\n  residual_weight: 1", 5, ["residual_weight is not"]),
    ("", 1, ["models or slices", "neither"]),
    (MODELS + SOURCE % "[0, 1]", 4, ["models or slices", "both"]),
    ("models: []", 3, ["models cannot be used", "a list of entries"]),
    ("models: {model: a}", 3, ["models cannot be used", "a list of entries"]),
    ("models: [{parameters: {}}]", 3, ["model is missing", "the path of a folder"]),
    ("models: [{model: 3}]", 3, ["model cannot be used", "got 3"]),
    ("models:\n- model: a\n- model: {path: a}", 5, ["model cannot be used", "the path of a folder"]),
    ("models: [{model: a+lora}]", 3, ["LoRA", "'a+lora'", "merge_and_unload"]),
    ("models: [{model: org/a@v1}]", 3, ["revisions", "hf download org/a --revision v1"]),
    ("models: [{model: org/a}]", 3, ["does not exist", "hf download org/a --local-dir"]),
    ("models: [{model: ./nowhere}]", 3, ["does not exist", "current folder"]),
    ('models: [{model: "a\\0"}]', 3, ["does not exist"]),
    ("models: [{model: ''}]", 3, ["does not exist"]),
    ("models: [{model: " + "x" * 300 + "}]", 3, ["does not exist"]),
    ("models:\n- model: a\n- model: ./a", 5, ["the same model twice", "also in line 4"]),
    (
        "slices:\n- sources: [{model: a, layer_range: [0, 1]},\n    {model: a, layer_range: [1, 2]}]",
        5,
        ["the same model twice in one slice"],
    ),
    (
        "slices:\n- sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 2]}]",
        4,
        ["different numbers of layers", "got 3, 1"],
    ),
    ("slices: [{sources: []}]", 3, ["sources cannot be used"]),
    ("slices: [{sources: [{model: a}]}]", 3, ["layer_range is missing"]),
    *[(SOURCE % bad, 3, ["layer_range"]) for bad in ("[0, 0]", "[3, 1]", "[-1, 2]", "[0]", "[0, 1.5]", "[no, 2]", "4")],
    ("models: [{model: a}]\nparameters: 3", 4, ["parameters cannot be used"]),
    *[
        (MODELS + "parameters:\n  density:\n    " + bad, 5 + (bad != "[]"), ["density cannot be used"])
        for bad in ("[]", "[1, [2]]", "[1, ~]", "[{value: 1}, 2]")
    ],
    (MODELS + "parameters: {density: }", 4, ["density cannot be used", "a list of {filter, value}"]),
    (MODELS + "parameters:\n  density:\n  - {filter: a, value: 1}\n  - {filter: 3, value: 1}", 7, ["filter cannot be"]),
    (MODELS + "parameters:\n  density:\n  - filter: a", 6, ["value is missing"]),
    (MODELS + "parameters: {density: {value: {}}}", 4, ["value cannot be used"]),
    (MODELS + "dtype: int8", 4, ["unknown dtype", "'int8'", "bfloat16"]),
    (MODELS + "out_dtype: 3", 4, ["out_dtype cannot be used"]),
    (MODELS + "granularity: row", 4, ["unknown granularity", "model, layer, tensor"]),
    (MODELS + "parameters: {granularity: [model]}", 4, ["unknown granularity"]),
    (MODELS + "granularity: layer\nparameters: {granularity: model}", 4, ["granularity is there twice", "line 5"]),
    (MODELS + "exponent: 1\nparameters: {exponent: 2}", 4, ["exponent is there twice"]),
    (MODELS + "exponent: [1]", 4, ["exponent cannot be used", "a number"]),
    (MODELS + "coefficients: {a: 1}", 4, ["coefficients cannot be used"]),
    (MODELS + "coefficients_from: 1", 4, ["coefficients_from cannot be used"]),
]


@pytest.mark.parametrize(("text", "line", "says"), REFUSED, ids=[repr(text[-50:]) for text, *_ in REFUSED])
def test_refusals_name_the_line(tmp_path, text, line, says):
    write_recipe(tmp_path, HEAD + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", ["weight", "density"])
    error = caught.value
    assert error.where == f"recipe.yaml:{line}", error
    for part in says:
        assert part in str(error)


def test_the_first_mistake_by_line_is_told(tmp_path):
    error = refusal(tmp_path, "base_model: [3]\nmerge_method: 3\nmodels: 4\nnonsense: 1")
    assert error.where == "recipe.yaml:1"
    assert refusal(tmp_path, "models: [{model: a}]\n").what == "merge_method is missing"


@pytest.mark.parametrize("text", ["[]", "3", "text", "- merge_method: ties"])
def test_what_is_no_mapping_is_no_recipe(tmp_path, text):
    assert "is not a recipe" in refusal(tmp_path, text).what


# Hostile YAML

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, 10)
)
DEEP_ALIASES = "a0: &a0 [[[[[[[[[[x]]]]]]]]]]\n" + "".join(
    f"a{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]\n" for i in range(1, 10)
)
HOSTILE = [
    (LAUGHS, 5, "too many values"),
    (DEEP_ALIASES, 7, "too many nested levels"),
    ("a: " + "[" * 500_000, 1, "too many nested levels|not valid YAML"),
    ("a: " + "{" * 70, 1, "a key is not a plain text"),
    ("a: " + "{b: " * 70, 1, "too many nested levels"),
    ("".join(" " * i + "a:\n" for i in range(100)), MAX_DEPTH + 1, "too many nested levels"),
    ("- a\n" * (MAX_NODES + 2), MAX_NODES, "too many values"),
    ("a: &a [*a]", 1, "contains it"),
    ("a: &a {b: *a}", 1, "contains it"),
    ("a: 1\nb: *c", 2, "has no anchor"),
    ("a: !!python/object/apply:os.system [rm]", 1, "tags are not supported"),
    ("a: !!python/name:os.system", 1, "tags are not supported"),
    ("%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x", 3, "tags are not supported"),
    ("a: !!binary aGk=", 1, "tags are not supported"),
    ("a: !!set {b}", 1, "tags are not supported"),
    ("a: !mine b", 1, "tags are not supported"),
    ("a: !!int x", 1, "no !!int"),
    ("a: !!int " + "1" * 5000, 1, "no !!int"),
    ("a: !!bool x", 1, "no !!bool"),
    ("a: !!float ''", 1, "no !!float"),
    ("a: 1\nb: 2\na: 3", 3, "'a' is there twice"),
    ("a: {b: 1, b: 2}", 1, "'b' is there twice"),
    ("b: &b {c: 1}\na:\n  <<: *b", 3, "merge keys"),
    ("1: a", 1, "a key is not a text"),
    ("a: 1\nyes: a", 2, "a key is not a text"),
    ("? [a]\n: b", 1, "a key is not a plain text"),
    ("a: &x b\n*x : c", 2, "a key is not a plain text"),
    ("a: 1\n---\nb: 1", 2, "more than one document"),
    ("a: [1, 2", 1, "not valid YAML"),
    ("a: b: c", 1, "not valid YAML"),
    ("a: 'b", 1, "not valid YAML"),
    ("\ta: b", 1, "not valid YAML"),
    ("a: @b", 1, "not valid YAML"),
    ("", 1, "is empty"),
    ("# nothing\n", 1, "is empty"),
    ("---\n...\n", 2, "is not a recipe"),
]


@pytest.mark.parametrize("libyaml", [True, False])
@pytest.mark.parametrize(("text", "line", "says"), HOSTILE, ids=[repr(text[:40]) for text, *_ in HOSTILE])
def test_hostile_yaml(tmp_path, text, line, says, libyaml, monkeypatch):
    monkeypatch.setattr("yaml.__with_libyaml__", libyaml)
    error = refusal(tmp_path, text)
    where, _, found = error.where.rpartition(":")
    assert where == "recipe.yaml"
    # The two parsers count an unfinished list to the line where it begins, or to the end of the file.
    assert abs(int(found) - line) <= ("not valid" in error.what)
    assert any(part in str(error) for part in says.split("|")), error


@pytest.mark.parametrize(
    ("raw", "where", "says"),
    [
        (b"a: 1\nb: \xff\n", ":2", "not UTF-8"),
        (b"\xff\xfea\x00:\x00", ":1", "not UTF-8"),
        (b"a: 1\n\nb: \x00", ":3", "not plain text"),
        (b"a: \x1b[31m", ":1", "not plain text"),
        (bytes(range(256)), ":2", "not UTF-8"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), ":1", "not plain text"),
        (b"#" * (MAX_NBYTES + 1), "", "too large"),
    ],
)
def test_what_is_no_text(tmp_path, raw, where, says):
    (tmp_path / "recipe.yaml").write_bytes(raw)
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe("recipe.yaml")
    assert caught.value.where == "recipe.yaml" + where


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("pipe", "a pipe"),
        (".", "a folder"),
        ("nowhere.yaml", "does not exist"),
        ("a\0", "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe(name)


def test_a_byte_order_mark_and_other_line_ends(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x,\r\n y]\r\n")
    node = parse_yaml(read_text(tmp_path / "r.yaml"), tmp_path)
    assert node.plain() == {"a": 1, "b": ["x", "y"]}
    assert node.line_of("b", 1) == 3


def test_scalars_mean_what_they_mean_to_the_safe_loader(tmp_path):
    yaml = pytest.importorskip("yaml")
    text = (
        "[1, -2, 0x1F, 0b11, 017, 1_000, 1:30, 1.5, 1e5, 1.e+5, .5, .inf, -.inf, yes, No, on, TRUE, ~, null, '', '1', "
        '"yes", a b, =, 1e-5, "\\u00e9", !!str 3, !!int "7", !!float 1, !!null x, ! 1]'
    )
    expected = yaml.safe_load(text.replace(" =,", "").replace("!!null x", "~"))
    got = parse_yaml(text, tmp_path).plain()
    got.remove("=")
    assert [(type(value), value) for value in got] == [(type(value), value) for value in expected]


def test_dates_and_long_numbers_are_texts(tmp_path):
    text = "[2024-01-01, 2024-01-01 10:00:00, " + "9" * 5000 + ", " + "1:" * 60_000 + "1]"
    assert all(isinstance(value, str) for value in parse_yaml(text, tmp_path).plain())


@pytest.mark.parametrize("text", ["a: [" + "x," * 90_000 + "]", "'" * MAX_NBYTES, "?" * MAX_NBYTES, "&a " * 300_000])
def test_large_files_come_to_an_end(tmp_path, text):
    with contextlib.suppress(RecipeError):
        assert parse_yaml(text, tmp_path).num_nodes <= MAX_NODES


@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("[]{}:,-&*!|>'\"%@`#? \nab1", max_size=60))
def test_any_text_gives_a_value_or_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        node = parse_yaml(read_text(path), path)
    except RecipeError as error:
        assert str(error).startswith(str(path))
    else:
        assert node.line >= 1


def test_pydantic_and_yaml_wait_for_a_recipe():
    code = """
import sys
import metagpt_fast.cli, metagpt_fast.merging, metagpt_fast.recipe_file, metagpt_fast.recipe_methods
print([name for name in ("yaml", "pydantic", "difflib") if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
