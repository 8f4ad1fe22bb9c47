"""Gram matrix in, coefficients out: the methods' formulas, extremes, and parameters."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_fast.errors import RecipeError
from metagpt_fast.methods import METHODS, Linear, MetaGPT, SparseMethod, TaskArithmetic, make_method
from metagpt_fast.recipe import make_recipe, parse_memory


def gram_of(norms):
    """The Gram matrix of a base of norm 3 and orthogonal task vectors of these norms."""
    return np.diag([9.0, *np.square(np.asarray(norms, np.float64))])


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (2, [1 / 14, 4 / 14, 9 / 14]),
        (1, [1 / 6, 2 / 6, 3 / 6]),
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (-1, [6 / 11, 3 / 11, 2 / 11]),
        (-2, [36 / 49, 9 / 49, 4 / 49]),
        (0.5, np.sqrt([1, 2, 3]) / np.sqrt([1, 2, 3]).sum()),
    ],
)
def test_metagpt(exponent, expected):
    np.testing.assert_allclose(MetaGPT(exponent=exponent).solve(gram_of([1, 2, 3]), True), expected, rtol=1e-15)


def test_metagpt_does_not_depend_on_cosines():
    gram = gram_of([1, 2, 3])
    gram[gram == 0] = 0.7
    np.testing.assert_array_equal(MetaGPT().solve(gram, True), MetaGPT().solve(gram_of([1, 2, 3]), True))


def test_metagpt_minimises_the_papers_bound():
    """Σ_t ‖τ_t‖² · ‖Σ_k λ_k τ_k − τ_t‖², which is what Eq. 15 comes from, for task vectors of any directions."""
    rng = np.random.default_rng(81)
    vectors = rng.normal(size=(3, 40)) * [[1.0], [2.0], [0.5]]
    squares = np.sum(vectors**2, axis=1)

    def bound(weights):
        return np.sum(squares * np.sum((weights @ vectors - vectors) ** 2, axis=1))

    gram = np.zeros((4, 4))
    gram[1:, 1:] = vectors @ vectors.T
    best = MetaGPT().solve(gram, True)
    for _ in range(200):
        assert bound(best + rng.normal(0, 0.05, 3)) >= bound(best)


@pytest.mark.parametrize(
    ("exponent", "norms", "expected"),
    [
        (2, [0, 0], [0, 0]),
        (0, [0, 0], [0, 0]),
        (-1, [0, 0], [0, 0]),
        (2, [0, 5], [0, 1]),
        (0, [0, 5], [0.5, 0.5]),
        (-1, [0, 5], [0, 1]),
        (2, [3], [1]),
        (2, [1e-160, 1e-160], [0.5, 0.5]),
        (2, [1e150, 2e150], [0.2, 0.8]),
        (300, [1.0, 2.0], [0, 1]),
        (-300, [1.0, 2.0], [1, 0]),
        (-2, [1e-150, 1e150], [1, 0]),
        (1e9, [1e-150, 1e150], [0, 1]),
    ],
)
def test_metagpt_at_its_limits(exponent, norms, expected):
    np.testing.assert_allclose(MetaGPT(exponent=exponent).solve(gram_of(norms), True), expected, rtol=1e-3, atol=1e-80)


@given(st.lists(st.floats(0, 1e150), min_size=1, max_size=6), st.floats(-400, 400))
def test_metagpt_is_a_share(norms, exponent):
    weights = MetaGPT(exponent=exponent).solve(gram_of(norms), True)
    assert np.all((weights >= 0) & (weights <= 1))
    assert weights.sum() == pytest.approx(1 if np.any(np.square(norms)) else 0)


def test_metagpt_without_a_base_reads_the_models_norms():
    np.testing.assert_allclose(MetaGPT().solve(np.diag([1.0, 4.0]), False), [0.2, 0.8], rtol=1e-15)


def test_task_arithmetic():
    assert TaskArithmetic().solve(np.zeros((4, 4)), True).tolist() == [0.3, 0.3, 0.3]
    assert TaskArithmetic(weight=(0.5, -1.0)).solve(np.zeros((3, 3)), True).tolist() == [0.5, -1.0]
    assert TaskArithmetic(weight=(0.5, -1.0), lambda_=2).solve(np.zeros((3, 3)), True).tolist() == [1.0, -2.0]
    assert TaskArithmetic(weight=(1, 3), normalize=True).solve(np.zeros((3, 3)), True).tolist() == [0.25, 0.75]
    assert TaskArithmetic(weight=(1, -1), normalize=True).solve(np.zeros((3, 3)), True).tolist() == [1, -1]
    assert not TaskArithmetic.needs_measurement
    assert TaskArithmetic.base == "required"


def test_linear():
    assert Linear().solve(np.zeros((2, 2)), False).tolist() == [0.5, 0.5]
    assert Linear(weight=(1.0, 3.0)).solve(np.zeros((2, 2)), False).tolist() == [0.25, 0.75]
    assert Linear(weight=(1.0, 3.0), normalize=False).solve(np.zeros((2, 2)), False).tolist() == [1.0, 3.0]
    assert Linear.base == "ignored"


@pytest.mark.parametrize(
    "value",
    [
        0.25,
        [0.25],
        (0.25,),
        np.float32(0.25),
        np.array([0.25]),
        np.array(0.25),
        np.array([0.25], np.float16),
        Fraction(1, 4),
    ],
    ids=repr,
)
def test_coefficients_may_be_any_numbers(value):
    recipe = make_recipe("base", ["a", "b"], method="task_arithmetic", coefficients=value)
    assert recipe.method.parameters() == {"weight": (0.25,), "normalize": False, "lambda": 1.0, "int8_mask": False}
    assert recipe.method.solve(np.zeros((3, 3)), True).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("value", ["0.5", b"1", True, None, [], [[1.0]], [True], ["x"], {}, np.nan, [np.inf], 10**400])
def test_coefficients_that_are_no_numbers(value):
    with pytest.raises(RecipeError) as caught:
        make_method("task_arithmetic", {"weight": value})
    assert caught.value.where.startswith("task_arithmetic.weight")


@pytest.mark.parametrize("method", ["metagpt", "model_stock", "slerp"])
def test_methods_that_take_no_coefficients(method):
    with pytest.raises(RecipeError, match=rf"^coefficients: {method} takes no coefficients") as caught:
        make_recipe("base", ["a", "b"], method=method, coefficients=[0.3, 0.2])
    assert caught.value.hint == (
        "metagpt solves for them; task_arithmetic and linear are given them" if method == "metagpt" else None
    )


def test_a_base_that_is_a_model_is_said_to_be_counted():
    with pytest.raises(RecipeError, match="slerp: got 4, expected 2; the base is one of them"):
        make_recipe("base", ["a", "b", "c"], method="slerp")


@pytest.mark.parametrize("value", ["2", True, None, np.nan, -np.inf, [2.0], 10**400])
def test_exponents_that_are_no_numbers(value):
    with pytest.raises(RecipeError, match="expected a finite number"):
        make_method("metagpt", {"exponent": value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "no models were given"),
        ({"models": "folder"}, "expected a list of folders"),
        ({"granularity": "row"}, "got 'row', expected model, layer, tensor"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"exclude": "("}, "not a regular expression"),
        ({"method": "ty"}, "got 'ty'"),
        ({"parameters": {"density": 1}}, "metagpt has no parameter 'density'"),
        ({"coefficients": 0.5}, "metagpt takes no coefficients"),
        ({"method": "linear", "exponent": 2}, "exponent belongs to metagpt"),
        ({"exponent": 1, "parameters": {"exponent": 1}}, "given twice"),
        ({"method": "linear", "coefficients": [1, 2, 3]}, "got 3, expected 1"),
        ({"method": "linear", "coefficients": [1, -1]}, "expected a sum other than 0; set normalize=false"),
        ({"method": "linear", "coefficients": 0}, "expected a sum other than 0"),
        ({"method": "linear", "parameters": {"normalize": "no"}}, "expected true or false"),
    ],
    ids=str,
)
def test_refused_recipes(settings, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe("base", **{"models": ["a", "b"], **settings})
    assert message in str(caught.value)


def test_weights_that_cancel_may_be_used_as_they_are():
    recipe = make_recipe("base", ["a", "b"], method="linear", coefficients=[1, -1], parameters={"normalize": False})
    assert recipe.method.solve(np.zeros((2, 2)), False).tolist() == [1, -1]


def test_memory_has_a_lower_bound():
    assert parse_memory("64MiB") == 64 << 20
    for memory in ("63MiB", 1, "1kB"):
        with pytest.raises(RecipeError, match="expected at least 64MiB"):
            parse_memory(memory)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_with_its_defaults(name):
    method = make_method(name, {})
    assert method.name == name
    assert method.equation
    assert method.parameters().keys() == METHODS[name].specs().keys()
    num_models = min(2, method.num_models[1] or 2)
    method.check_num_models(num_models)
    if isinstance(method, SparseMethod):
        assert method.election(np.ones((num_models, 6)), np.ones(num_models)).scales.shape == (num_models,)
        return
    has_base = method.base in {"required", "optional"}
    coefficients = method.solve(gram_of(np.ones(num_models))[not has_base :, not has_base :], has_base)
    assert coefficients.shape == (num_models,)
    assert coefficients.dtype == np.float64


def test_a_gram_matrix_is_not_changed():
    gram = gram_of([1, 2])
    for name, cls in METHODS.items():
        if not issubclass(cls, SparseMethod) and cls.num_models[1] != 1:
            make_method(name, {}).solve(gram, True)
    np.testing.assert_array_equal(gram, gram_of([1, 2]))
