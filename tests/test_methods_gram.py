"""Methods that need Gram matrices only: the merged vector is that of the definition, evaluated on the vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metagpt_fast import merge_state_dicts
from metagpt_fast.errors import DataError, RecipeError
from metagpt_fast.methods import METHODS, Karcher, ModelStock, MultiSlerp, NuSlerp, Passthrough, Slerp, make_method

from . import method_oracles as oracles
from .method_oracles import norm

ROUNDING = 1e-11


def models_of(seed, num_models, numel, spread):
    """Models around one vector of norm about 1: ``spread`` is how far from it, relative to its norm."""
    rng = np.random.default_rng(seed)
    center = rng.normal(size=numel) / np.sqrt(numel)
    scales = np.exp(rng.normal(size=(num_models, 1)))
    return center + spread * scales * rng.normal(size=(num_models, numel)) / np.sqrt(numel)


def merged(method, models, base=None):
    """What the coefficients make of the models, or of the task vectors added to the base."""
    if base is None:
        return method.solve(models @ models.T, False) @ models
    vectors = np.vstack([base, models - base])
    return base + method.solve(vectors @ vectors.T, True) @ vectors[1:]


def by_definition(name, models, base=None, **parameters):
    """The merged vector, evaluated on the vectors step by step."""
    return getattr(oracles, name)(base, list(models), **parameters).result


def assert_close(found, expected, *sizes, tolerance=ROUNDING):
    assert np.isfinite(found).all()
    assert norm(found - expected) <= tolerance * max(map(norm, (expected, *sizes)))


seeds = st.integers(0, 2**32 - 1)
numels = st.integers(2, 60)
# From models that cannot be told apart to such that have nothing in common.
spreads = st.sampled_from([0.0, 1e-7, 1e-4, 3e-3, 0.03, 0.3, 3.0])
places = st.floats(-1, 2)
weights = st.floats(0.1, 3)


@given(seeds, numels, spreads, places)
def test_slerp(seed, numel, spread, t):
    models = models_of(seed, 2, numel, spread)
    cosine = models[0] @ models[1] / norm(models[0]) / norm(models[1])
    assume(abs(abs(cosine) - 0.9995) > 1e-9)  # where either side is right
    assert_close(merged(Slerp(t=t), models), by_definition("slerp", models[1:], models[0], t=t), *models)


def test_slerp_is_a_line_near_a_line_and_an_arc_elsewhere():
    def weights_at(cosine):
        return Slerp(t=0.25).solve(np.array([[4.0, 6 * cosine], [6 * cosine, 9.0]]), False)

    for cosine in (1.0, 0.99951, -0.99951, -1.0, 1 + 1e-6, -1 - 1e-6):
        np.testing.assert_allclose(weights_at(cosine), [0.75, 0.25], rtol=1e-15)
    np.testing.assert_allclose(weights_at(0.0), np.sin(np.pi / 2 * np.array([0.75, 0.25])), rtol=1e-15)
    angle = np.arccos(-0.9994)
    np.testing.assert_allclose(weights_at(-0.9994), np.sin(angle * np.array([0.75, 0.25])) / np.sin(angle), rtol=1e-12)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_reaches_both_ends(t):
    np.testing.assert_allclose(Slerp(t=t).solve(np.array([[4.0, 3], [3, 9]]), False), [1 - t, t], atol=1e-16)


def test_slerp_from_a_zero_vector():
    vector = np.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(merged(Slerp(t=0.5), vector), np.sqrt(0.5) * vector[1], rtol=1e-14)
    np.testing.assert_allclose(
        merged(Slerp(t=0.5), vector), by_definition("slerp", vector[1:], vector[0], t=0.5), rtol=1e-14
    )
    assert merged(Slerp(), np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("has_base", [False, True])
@given(seed=seeds, numel=numels, spread=spreads, first=weights, second=weights)
def test_nuslerp(has_base, seed, numel, spread, first, second):
    center, *models = models_of(seed, 3, numel, spread)
    base = center if has_base else None
    expected = by_definition("nuslerp", models, base, weight=(first, second))
    assert_close(merged(NuSlerp(weight=(first, second)), np.array(models), base), expected, center, *models)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [((1, 3), 0.75), ((2, 0), 0.0), ((-1, 3), 1.5), ((1, -1), 0.5), ((0, 0), 0.5), ((4e-7, 4e-7), 0.5), (1, 0.5)],
)
def test_nuslerp_weights(weight, expected):
    # Two equal vectors: the coefficients are those of the straight line.
    method = NuSlerp(weight=weight)
    np.testing.assert_allclose(method.solve(np.full((2, 2), 5.0), False), [1 - expected, expected], atol=1e-15)


def test_nuslerp_of_opposite_vectors_is_a_line():
    """Also where rounding hides that they are opposite: 1/sin Ω would be 3e3 there, of nothing but errors."""
    for cosine in (-1, -1 + 1e-7, -1 - 1e-7):
        gram = np.array([[4.0, 6 * cosine], [6 * cosine, 9]])
        assert NuSlerp(weight=(1, 3)).solve(gram, False).tolist() == [0.25, 0.75]
    angle = np.arccos(-1 + 1e-5)
    found = NuSlerp(weight=(1, 3)).solve(np.array([[1, -1 + 1e-5], [-1 + 1e-5, 1]]), False)
    np.testing.assert_allclose(found, np.sin(angle * np.array([0.25, 0.75])) / np.sin(angle), rtol=1e-9)


@pytest.mark.parametrize("numbers", [(0.0, 1.0), (0.0, 0.0), (1e-9, 1.0), (1e-9, 2e-9)])
def test_nuslerp_of_short_vectors(numbers):
    models = np.array(numbers)[:, None] * np.array([[3.0, 4.0], [4.0, -2.0]])
    expected = by_definition("nuslerp", models, weight=1)
    # One of the numbers cancels to 0, or to a rounding error, as NumPy's sums have it.
    np.testing.assert_allclose(merged(NuSlerp(), models), expected, rtol=1e-13, atol=1e-13 * np.abs(models).max())


def test_nuslerp_says_what_has_an_angle():
    assert NuSlerp().axis is None
    assert NuSlerp(nuslerp_row_wise=True).axis is None
    assert NuSlerp(nuslerp_flatten=False).axis == "row"
    assert NuSlerp(nuslerp_flatten=False, nuslerp_row_wise=True).axis == "column"


@pytest.mark.parametrize("has_base", [False, True])
@given(seed=seeds, num_models=st.integers(1, 6), numel=numels, spread=spreads, normalize=st.booleans())
def test_multislerp(has_base, seed, num_models, numel, spread, normalize):
    models = models_of(seed, 1 + num_models, numel, spread)
    weight = np.random.default_rng(seed).uniform(0.1, 2, num_models)
    method = MultiSlerp(weight=weight, normalize_weights=normalize)
    center, models = models[0], models[1:]
    base = center if has_base else None
    try:
        expected = by_definition("multislerp", models, base, weight=weight, normalize_weights=normalize)
    except ValueError:
        assume(False)
    sizes = [max(1.0, weight.sum()) * vector for vector in (center, *models)]
    assert_close(merged(method, models, base), expected, *sizes)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_multislerp_eps(eps):
    models = models_of(5, 3, 20, 0.5)
    weight = np.array([1.0, 2.0, 0.5])
    expected = by_definition("multislerp", models, weight=weight, eps=eps or 1e-300)
    assert_close(merged(MultiSlerp(weight=weight, eps=eps), models), expected)


def test_multislerp_of_one_model_is_the_model():
    assert MultiSlerp(weight=0.2).solve(np.array([[9.0, 1], [1, 4]]), True).tolist() == [1]
    MultiSlerp(weight=0.0).check_num_models(1)


def test_multislerp_of_opposite_vectors():
    direction = np.array([0.6, -0.8])
    two = np.array([2.0, -3.0])[:, None] * direction
    np.testing.assert_allclose(
        merged(MultiSlerp(weight=(1, 1)), two), by_definition("multislerp", two, weight=1), rtol=1e-13
    )
    noisy = two @ two.T + 6 * 1e-7 * (1 - np.eye(2))
    assert MultiSlerp().solve(noisy, False).tolist() == [0.5, 0.5]
    # With other weights a direction is left.
    expected = by_definition("multislerp", two, weight=(3, 1))
    assert_close(merged(MultiSlerp(weight=(3, 1)), two), expected, two[1])
    three = np.array([[1.0, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    with pytest.raises(DataError, match="multislerp: the weighted directions of the models add up to 0"):
        merged(MultiSlerp(), three)


@pytest.mark.parametrize("num_models", [2, 3])
def test_multislerp_of_vectors_that_are_all_zero_is_zero(num_models):
    """Two or more models that leave a tensor alone: mergekit refuses three."""
    weights = MultiSlerp().solve(np.zeros((num_models, num_models)), False)
    assert np.isfinite(weights).all()


def test_multislerp_with_one_zero_vector():
    models = np.array([[0.0, 0, 0], [1, 2, 2], [4, 0, 3]])
    assert_close(merged(MultiSlerp(weight=(1, 2, 3)), models), by_definition("multislerp", models, weight=(1, 2, 3)))


@given(seed=seeds, num_models=st.integers(1, 6), numel=st.integers(3, 60), spread=spreads, max_iter=st.integers(0, 12))
def test_karcher(seed, num_models, numel, spread, max_iter):
    models = models_of(seed, num_models, numel, spread)
    method = Karcher(max_iter=max_iter)
    try:
        found = merged(method, models)
    except DataError:
        assume(False)
    # The definition leaves out a model within tol of the mean; whether a step is shorter than tol, rounding decides.
    assert_close(found, by_definition("karcher", models, max_iter=max_iter), *models, tolerance=1e-5)


@given(seed=seeds, num_models=st.integers(2, 6), numel=st.integers(10, 60), spread=st.sampled_from([0.01, 0.1, 0.3]))
def test_karcher_to_the_last_digits(seed, num_models, numel, spread):
    models = models_of(seed, num_models, numel, spread)
    found = merged(Karcher(tol=1e-12, max_iter=60), models)
    assert_close(found, by_definition("karcher", models, tol=1e-12, max_iter=60), *models)
    units = models / np.linalg.norm(models, axis=1, keepdims=True)
    mean = found / norm(found)
    cosines = units @ mean
    pulls = np.arccos(np.clip(cosines, -1, 1)) / np.sqrt(1 - cosines**2) @ (units - cosines[:, None] * mean)
    assert norm(pulls) < 1e-6  # the mean is where the directions to the models cancel


def test_karcher_of_two_models_is_halfway():
    models = np.array([[3.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(merged(Karcher(), models), [np.sqrt(2), np.sqrt(2)], rtol=1e-12)


def test_karcher_leaves_short_models_out_of_the_direction():
    models = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 9e-6]])
    assert_close(merged(Karcher(), models), by_definition("karcher", models))
    assert_close(merged(Karcher(), models[:2]), models[0] / 2)
    assert merged(Karcher(), models[1:]).tolist() == [0, 0, 0]
    assert merged(Karcher(), models[1:] * 1e6).tolist() == pytest.approx([0, 0, 4.5])
    assert merged(Karcher(), models[2:]).tolist() == models[2].tolist()


def test_karcher_of_directions_that_cancel():
    three = np.array([[1.0, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    assert_close(merged(Karcher(), three), by_definition("karcher", three))
    with pytest.raises(DataError, match="karcher: a model points in the direction opposite to the mean"):
        merged(Karcher(), np.array([[1.0, 2.0], [-2.0, -4.0]]))


@pytest.mark.parametrize("tol", [0.0, 0.5])
def test_karcher_with_other_tolerances(tol):
    models = models_of(2, 3, 30, 0.2)
    exact = by_definition("karcher", models, tol=1e-14, max_iter=100)
    assert_close(merged(Karcher(tol=tol, max_iter=100), models), exact, tolerance=max(tol, ROUNDING))
    assert merged(Karcher(tol=0), np.ones((2, 5))).tolist() == pytest.approx([1] * 5)


@given(seed=seeds, num_models=st.integers(2, 6), numel=numels, spread=spreads)
def test_model_stock(seed, num_models, numel, spread):
    base, *models = models_of(seed, 1 + num_models, numel, spread)
    expected = by_definition("model_stock", models, base)
    assert_close(merged(ModelStock(), np.array(models), base), expected, *models, tolerance=1e-7)


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        ([[1, 1], [1, 1]], 0.5),
        ([[1, 0], [0, 1]], 0.0),
        ([[4, 3], [3, 9]], 0.5 / 1.5),
        ([[4, -3], [-3, 9]], -0.5 / 0.5),
        ([[4, -6], [-6, 9]], 0.0),
        ([[4, 0], [0, 0]], 0.0),
        ([[0, 0], [0, 0]], 0.0),
        ([[1e-8, 1e-8], [1e-8, 1e-8]], 0.01 / 1.01),
        (np.eye(3) - (1 - np.eye(3)) / 2, 0.0),
        (np.eye(3) / 2 + 0.5, 0.5 / 2),
    ],
    ids=str,
)
def test_model_stock_at_its_limits(gram, expected):
    gram = np.pad(np.array(gram, np.float64), ((1, 0), (1, 0)))
    np.testing.assert_allclose(ModelStock().solve(gram, True), np.full(len(gram) - 1, expected), atol=1e-15)


def test_model_stock_says_what_has_an_angle():
    assert ModelStock().axis is None
    assert ModelStock(filter_wise=True).axis == "row"


@pytest.mark.parametrize(("scale", "expected"), [(None, 1.0), (0.5, 0.5), ([None], 1.0), ([-2], -2.0)])
def test_passthrough(scale, expected):
    assert Passthrough(scale=scale).solve(np.zeros((1, 1)), False).tolist() == [expected]
    assert not Passthrough.needs_measurement


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("name", ["nuslerp", "model_stock", "multislerp", "metagpt"])
def test_rows_are_solved_as_one_by_one(name, has_base):
    """Array operations, or the loop that a method has without its own; rows of zeros among them."""
    method = make_method(name, {})
    rng = np.random.default_rng(9)
    vectors = rng.normal(size=(50, 2 + has_base, 30)) * np.exp(4 * rng.normal(size=(50, 2 + has_base, 1)))
    vectors[7] = 0
    vectors[8, -1] = 0
    vectors[9, -1] = -3 * vectors[9, -2]
    grams = vectors @ vectors.transpose(0, 2, 1)
    rows = method.solve_rows(grams, has_base)
    assert rows.shape == (50, 2)
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, [method.solve(gram, has_base) for gram in grams])
    assert method.solve_rows(grams[:0], has_base).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "parameters", "num_models"),
    [
        ("slerp", {"t": 0.3}, 1),
        ("karcher", {}, 3),
        ("multislerp", {"weight": (1, 2, 0.5)}, 3),
        ("nuslerp", {"weight": (1, 2)}, 2),
        ("nuslerp", {"weight": (1, 2), "nuslerp_flatten": False}, 2),
        ("nuslerp", {"weight": (1, 2), "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
        ("model_stock", {}, 3),
        ("model_stock", {"filter_wise": True}, 3),
        ("passthrough", {"scale": 0.5}, 1),
    ],
)
@pytest.mark.parametrize("shape", [(30,), (6, 5), (1, 5), (6, 1), (3, 2, 5), (2, 3, 2, 2)])
def test_through_the_whole_merge(name, parameters, num_models, shape):
    """Rows are of the last dimension, columns of the first, and a vector is one of either; in float64."""
    rng = np.random.default_rng(len(shape))
    base = rng.normal(size=shape)
    models = [base + 0.3 * rng.normal(size=shape) for _ in range(num_models)]
    result = merge_state_dicts(
        {"tensor": base}, [{"tensor": model} for model in models], method=name, parameters=parameters
    )
    own_base = base if METHODS[name].base != "ignored" else None
    assert_close(result["tensor"], by_definition(name, models, own_base, **parameters), base)


NOISE = 3e-7
"""Relative error of a Gram matrix; the kernels' is 1.5e-7 in fp32 and up to 5e-7 in bf16."""


@pytest.mark.parametrize("spread", [1e-5, 1e-3, 0.03])
@pytest.mark.parametrize(
    ("name", "num_models"),
    [
        ("slerp", 2),
        ("nuslerp", 2),
        ("multislerp", 2),
        ("multislerp", 4),
        ("karcher", 2),
        ("karcher", 4),
        ("model_stock", 2),
        ("model_stock", 4),
    ],
)
def test_errors_of_the_gram_matrix_are_not_amplified(name, num_models, spread):
    """Models of one base: 1 − cos is down to 1e-10, below the error of the cosine. Coefficients must not notice."""
    rng = np.random.default_rng(num_models)
    center = rng.normal(size=300)
    vectors = center + spread * rng.normal(size=(num_models, 300))
    method = make_method(name, {})
    has_base = name == "model_stock"
    gram = np.pad(vectors @ vectors.T, ((1, 0), (1, 0))) if has_base else vectors @ vectors.T
    exact = method.solve(gram, has_base)
    for _ in range(50):
        noise = rng.uniform(-NOISE, NOISE, gram.shape)
        noisy = gram * (1 + (noise + noise.T) / 2)
        found = method.solve(noisy, has_base)
        np.testing.assert_allclose(found, exact, atol=2 * NOISE)
        # Model space: the sum of the coefficients decides the length, their differences the way between the models.
        assert norm((found - exact) @ vectors) <= 2 * NOISE * num_models * norm(center)


@pytest.mark.parametrize(
    ("name", "parameters", "num_models", "message"),
    [
        ("slerp", {}, 1, "models: number of models for slerp: got 1, expected 2"),
        ("slerp", {}, 3, "got 3, expected 2"),
        ("slerp", {"t": [0.5]}, 2, "expected a finite number"),
        ("nuslerp", {}, 3, "got 3, expected 2"),
        ("nuslerp", {"weight": [1, 2, 3]}, 2, "number of values of weight: got 3"),
        ("nuslerp", {"nuslerp_flatten": 1}, 2, "expected true or false"),
        ("multislerp", {"weight": [1, -1]}, 2, "expected a sum other than 0; set normalize_weights=false"),
        ("multislerp", {"eps": -1}, 2, "at least 0"),
        ("karcher", {"max_iter": 1.5}, 2, "expected a whole number"),
        ("karcher", {"max_iter": -1}, 2, "at least 0"),
        ("karcher", {"tol": np.nan}, 2, "expected a finite number"),
        ("karcher", {"weight": 1}, 2, "karcher has no parameter 'weight'"),
        ("model_stock", {}, 1, "got 1, expected at least 2"),
        ("passthrough", {}, 2, "got 2, expected 1"),
        ("passthrough", {"scale": "x"}, 1, "expected a finite number"),
        ("passthrough", {"scale": [1, 2]}, 1, "number of values of scale: got 2"),
    ],
)
def test_refused_parameters(name, parameters, num_models, message):
    with pytest.raises(RecipeError) as caught:
        make_method(name, parameters).check_num_models(num_models)
    assert message in str(caught.value)


def test_weights_that_cancel_may_be_used_as_they_are():
    method = MultiSlerp(weight=(1, -1), normalize_weights=False)
    method.check_num_models(2)
    vectors = np.array([[3.0, 0.0], [0.0, 1.0]])
    assert_close(merged(method, vectors), by_definition("multislerp", vectors, weight=(1, -1), normalize_weights=False))


@pytest.mark.parametrize(
    ("name", "base", "num_models"),
    [
        ("slerp", "model", (2, 2)),
        ("nuslerp", "optional", (2, 2)),
        ("multislerp", "optional", (1, None)),
        ("karcher", "model", (1, None)),
        ("model_stock", "required", (2, None)),
        ("passthrough", "ignored", (1, 1)),
    ],
)
def test_how_the_base_takes_part(name, base, num_models):
    assert METHODS[name].base == base
    assert METHODS[name].num_models == num_models
