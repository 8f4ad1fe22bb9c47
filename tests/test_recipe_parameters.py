"""What a setting is worth: scopes, filters, gradients and types, against independent formulas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metagpt_fast.errors import RecipeError
from metagpt_fast.recipe_parameters import convert, interpolate, layer_fraction

from .recipes import Every, llama_names, method_with, resolve

HEAD = "merge_method: every\nbase_model: base\n"
NAMES = llama_names(5)
Q, UP, NORM, HEAD_NAME = "self_attn.q_proj", "mlp.up_proj", "model.norm.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def values(resolved, parameter, model=None):
    """Return a parameter's value of each output tensor, shared or of one input."""
    return {
        tensor.name: (tensor.parameters if model is None else tensor.inputs[model].parameters)[parameter]
        for tensor in resolved.tensors
    }


def refusal(*arguments, **settings):
    with pytest.raises(RecipeError) as caught:
        resolve(*arguments, **settings)
    return caught.value


# Interpolation


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.integers(1, 80), st.data())
def test_interpolation_is_that_of_numpy(points, num_layers, data):
    t = layer_fraction(data.draw(st.integers(0, num_layers - 1)), num_layers)
    expected = np.interp(t, np.linspace(0, 1, len(points)), points) if len(points) > 1 else points[0]
    assert interpolate(points, t) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(0, 1))
def test_interpolation_is_exact_to_a_few_roundings(points, t):
    position = Fraction(t) * (len(points) - 1)
    exact = sum(max(0, 1 - abs(position - i)) * Fraction(point) for i, point in enumerate(points))
    assert abs(Fraction(interpolate(points, t)) - exact) <= Fraction(8, 2**53) * len(points) * Fraction(1e6 + 1)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_interpolation_meets_its_points(points):
    assume(all(abs(point) < 1e300 for point in points))
    assert interpolate(points, 0.0) == points[0]
    assert interpolate(points, 1.0) == points[-1]


def test_the_fraction_of_a_layer():
    assert [layer_fraction(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layer_fraction(0, 1) == 1


# Gradients over layers


def test_gradients_run_over_the_layers_and_are_at_0_outside(tmp_path):
    resolved = resolve(tmp_path, HEAD + "models: [{model: a, parameters: {weight: [0, 1, 5]}}]", NAMES)
    weights = values(resolved, "weight", 0)
    assert [weights[f"model.layers.{i}.{UP}.weight"] for i in range(5)] == [0, 0.5, 1, 3, 5]
    assert {weights[name] for name in (NORM, HEAD_NAME, "model.embed_tokens.weight")} == {0}


def test_a_single_layer_is_at_1(tmp_path):
    resolved = resolve(tmp_path, HEAD + "models: [{model: a, parameters: {weight: [0, 1]}}]", llama_names(1))
    assert values(resolved, "weight", 0)[f"model.layers.0.{UP}.weight"] == 1


def test_texts_and_booleans_pick_an_element(tmp_path):
    text = "parameters: {weight: 1, mode: [a, b, c], normalize: [no, '1', 0], steps: [2, 6]}\nmodels: [{model: a}]"
    resolved = resolve(tmp_path, HEAD + text, NAMES)
    layers = [f"model.layers.{i}.norm.weight" for i in range(5)]
    assert [values(resolved, "mode")[name] for name in layers] == ["a", "a", "b", "b", "c"]
    assert [values(resolved, "normalize")[name] for name in layers] == [False, False, True, True, False]
    assert [values(resolved, "steps")[name] for name in layers] == [2, 3, 4, 5, 6]
    assert all(type(value) is int for value in values(resolved, "steps").values())


def test_a_gradient_of_whole_numbers_has_to_stay_whole(tmp_path):
    text = "models: [{model: a}]\nparameters:\n  weight: 1\n  steps: [0, 1]"
    error = refusal(tmp_path, HEAD + text, NAMES)
    assert error.where == "recipe.yaml:6"
    assert "0.25" in error.got


# Precedence and filters


def test_the_first_entry_that_fits_counts_and_without_one_the_next_scope(tmp_path):
    text = f"""
slices:
- sources:
  - {{model: base, layer_range: [0, 2]}}
  - model: a
    layer_range: [0, 2]
    parameters:
      weight:
      - {{filter: layers.0.{UP}, value: 1}}
      - {{filter: {UP}, value: 2}}
      - {{filter: layers, value: 3}}
      - {{filter: 'layers.1.{Q}', value: 4}}
  parameters:
    weight: {{filter: lm_head, value: 5}}
    density: [{{filter: '*', value: 0.5}}, {{filter: mlp, value: 0.1}}]
parameters:
  weight: 6
  density: 0.7
  lambda: {{filter: norm, value: 8}}
"""
    weights = values(resolved := resolve(tmp_path, HEAD + text, llama_names(2)), "weight", 1)
    assert weights == {
        "lm_head.weight": 5,
        "model.embed_tokens.weight": 6,
        "model.norm.weight": 6,
        f"model.layers.0.{UP}.weight": 1,
        f"model.layers.1.{UP}.weight": 2,
        "model.layers.0.norm.weight": 3,
        "model.layers.1.norm.weight": 3,
        f"model.layers.0.{Q}.weight": 3,
        f"model.layers.1.{Q}.weight": 3,
    }
    assert set(values(resolved, "density", 1).values()) == {0.5}
    assert {name for name, value in values(resolved, "lambda").items() if value == 8} == {
        name for name in weights if "norm" in name
    }
    assert set(values(resolved, "lambda").values()) == {8.0, 1.0}
    assert set(values(resolved, "scale").values()) == {None}


def test_own_values_go_by_the_input_name_and_shared_ones_by_the_output_name(tmp_path):
    text = """
slices:
- sources:
  - {model: base, layer_range: [0, 1]}
  - {model: a, layer_range: [3, 4]}
parameters:
  weight: [{filter: layers.3., value: 3}, {filter: layers.0., value: 0}, {value: 9}]
  lambda: [{filter: layers.3., value: 3}, {filter: layers.0., value: 0}, {value: 9}]
"""
    resolved = resolve(tmp_path, HEAD + text, NAMES)
    name = "model.layers.0.norm.weight"
    assert values(resolved, "weight", 1)[name] == 3
    assert values(resolved, "lambda")[name] == 0


def test_a_base_has_no_values_of_its_own_unless_it_is_a_model(tmp_path):
    text = "models: [{model: base, parameters: {density: 0.5}}, {model: a}]\nparameters: {weight: 2}"
    for use, is_own in (("required", False), ("optional", False), ("model", True), ("ignored", True)):
        resolved = resolve(tmp_path, HEAD + text, NAMES, method_with(use))
        first = resolved.tensors[0]
        assert bool(first.inputs[0].parameters) == is_own
        assert first.inputs[1].parameters == {"weight": 2.0, "density": 1.0}
        assert first.base == (None if use == "ignored" else 0)
        assert [warning.split(": ")[1] for warning in resolved.warnings] == (
            [] if is_own else ["density has no effect on the base model"]
        )


def test_equal_values_are_one_object(tmp_path):
    text = "models: [{model: a}, {model: b}]\nparameters: {weight: [{filter: mlp, value: 1}, {value: 2}]}"
    resolved = resolve(tmp_path, HEAD + text, NAMES)
    assert len({id(tensor.parameters) for tensor in resolved.tensors}) == 1
    assert len({id(each.parameters) for tensor in resolved.tensors for each in tensor.inputs[:2]}) == 2


def test_int8_mask_has_no_effect_anywhere(tmp_path):
    text = "models: [{model: a, parameters: {int8_mask: true}}]\nparameters: {weight: 1, int8_mask: true}"
    assert "int8_mask" not in resolve(tmp_path, HEAD + text, NAMES).tensors[0].parameters


# Given and computed weights


def test_given_coefficients_are_weights(tmp_path):
    text = "models: [{model: a}, {model: base}, {model: b}]\ncoefficients: [0.25, 0.5]"
    first = resolve(tmp_path, HEAD + text, NAMES).tensors[0]
    assert [dict(each.parameters).get("weight") for each in first.inputs] == [0.25, None, 0.5]
    one = resolve(tmp_path, HEAD + "models: [{model: a}, {model: b}]\ncoefficients: 0.3", NAMES).tensors[0]
    assert [dict(each.parameters).get("weight") for each in one.inputs] == [0.3, 0.3, None]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("models: [{model: a}]\ncoefficients: [1, 2]", 4, "number of coefficients: got 2"),
        ("models: [{model: a}]\ncoefficients: [1]\nparameters: {weight: 2}", 4, "weights are given twice"),
        ("models: [{model: a, parameters: {weight: 2}}]\ncoefficients: [1]", 4, "weights are given twice"),
        ("slices: [{sources: [{model: base, layer_range: [0, 1]}]}]\nparameters: {coefficients: 1}", 4, "with slices"),
    ],
)
def test_given_coefficients_that_cannot_be_used(tmp_path, text, line, says):
    error = refusal(tmp_path, HEAD + text, NAMES)
    assert error.where == f"recipe.yaml:{line}"
    assert says in str(error)


def test_computed_weights_need_not_be_given(tmp_path):
    from metagpt_fast.methods import METHODS

    ties = METHODS["ties"]
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a%s}]\n"
    resolved = resolve(tmp_path, text % "" + "coefficients: metagpt", NAMES, ties)
    assert resolved.tensors[0].parameters["coefficients"] == "metagpt"
    assert resolved.tensors[0].inputs[0].parameters["weight"] == 1
    error = refusal(tmp_path, text % ", parameters: {weight: 1}" + "coefficients: metagpt", NAMES, ties)
    assert error.where == "recipe.yaml:3"
    assert "coefficients in line 4" in error.got
    error = refusal(tmp_path, text % "" + "coefficients: given", NAMES, ties)
    assert "needs a value of weight" in error.what
    error = refusal(tmp_path, text % "" + "coefficients: metagtp", NAMES, ties)
    assert error.where == "recipe.yaml:4"
    assert error.expected == "given, metagpt"
    metagpt = METHODS["metagpt"]
    error = refusal(tmp_path, text % "" + "coefficients: [1]", NAMES, metagpt)
    assert error.what == "metagpt takes no coefficients"


# Refusals


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("models: [{model: a}]", 3, ["needs a value of weight", "of a", "put weight under parameters"]),
        (
            "models:\n- {model: a, parameters: {weight: {filter: mlp, value: 1}}}",
            4,
            ["'lm_head.weight' of a", "a filter"],
        ),
        ("models: [{model: a}]\nparameters: {wieght: 1}", 4, ["no parameter 'wieght'", "did you mean weight?"]),
        ("models: [{model: a}]\nparameters: {gamma: 1}", 4, ["gamma belongs to breadcrumbs"]),
        ("models:\n- model: a\n  parameters:\n    lambda: 1", 6, ["lambda is one value for all models"]),
        ("models:\n- model: a\n  parameters:\n    granularity: layer", 6, ["put it at the top level"]),
    ],
)
def test_refusals_name_the_line(tmp_path, text, line, says):
    error = refusal(tmp_path, HEAD + text, NAMES)
    assert error.where == f"recipe.yaml:{line}", error
    for part in says:
        assert part in str(error)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weight", "1e-5", 1e-5),
        ("weight", " 2 ", 2.0),
        ("weight", 3, 3.0),
        ("weight", -0.5, -0.5),
        ("density", 1, 1.0),
        ("scale", 2, 2.0),
        ("steps", 4.0, 4),
        ("steps", "7", 7),
        ("steps", "1e1", 10),
        ("normalize", 0, False),
        ("normalize", 1.0, True),
        ("normalize", "Yes", True),
        ("normalize", "off", False),
        ("mode", "b", "b"),
    ],
)
def test_types(name, value, expected):
    got = convert("every", Every.specs()[name], value, "r:1")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weight", True, "a finite number"),
        ("weight", "abc", "a finite number"),
        ("weight", float("nan"), "a finite number"),
        ("weight", "inf", "a finite number"),
        ("weight", 10**400, "a finite number"),
        ("weight", "9" * 5000, "a finite number"),
        ("density", 1.5, "from 0 to 1"),
        ("density", -1, "from 0 to 1"),
        ("steps", 1.5, "a whole number"),
        ("steps", False, "a whole number"),
        ("normalize", 2, "true or false"),
        ("normalize", "maybe", "true or false"),
        ("mode", "d", "a, b, c"),
        ("mode", 1, "a, b, c"),
    ],
)
def test_values_of_another_type_or_range(name, value, says):
    with pytest.raises(RecipeError) as caught:
        convert("every", Every.specs()[name], value, "recipe.yaml:9")
    assert caught.value.where == "recipe.yaml:9"
    assert says in caught.value.expected
    assert len(str(caught.value)) < 500


def test_every_entry_is_looked_at_though_no_tensor_needs_it(tmp_path):
    text = "models: [{model: a}]\nparameters:\n  weight:\n  - value: 1\n  - {filter: nothing, value: high}"
    assert refusal(tmp_path, HEAD + text, NAMES).where == "recipe.yaml:7"
