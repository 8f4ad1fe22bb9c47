"""When the user is told to doubt a merge."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast import trust
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, F32, F64
from metagpt_fast.recipe import make_recipe

from .checkpoints import random_states, read_state, tensor, write_family

LABELS = ("chat", "math", "code")


def merged(tmp_path, vectors, **settings):
    """Merge models whose task vectors these are, with a base of ones."""
    size = len(vectors[0])
    states = [{"a": tensor(np.ones(size), F32)}, *({"a": tensor(1 + np.array(v), F32)} for v in vectors)]
    base, models = write_family(tmp_path / "in", states)
    return mf.merge(base, models, tmp_path / "out", **settings)


def test_orthogonal_task_vectors_of_one_size_are_nothing_to_warn_of(tmp_path):
    assert merged(tmp_path, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]).warnings == ()


@pytest.mark.parametrize(
    ("second", "says"), [([0.5, 0.25], "cosine 0.89: they share"), ([-0.5, 0.125], "-0.97: they undo")]
)
def test_cosines_far_from_zero(tmp_path, second, says):
    report = merged(tmp_path, [[0.5, 0], second])
    [warning] = report.warnings
    assert "m0 and m1 are far from orthogonal" in warning
    assert says in warning
    assert abs(report.cosines[0, 1]) > 0.8


def test_a_model_that_takes_nearly_all(tmp_path):
    [warning] = merged(tmp_path, [[0.5, 0], [0, 0.125]]).warnings
    assert warning.startswith("m0 takes 94.1% of the weight")


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_coefficients_outside_0_to_1(tmp_path, method):
    report = merged(tmp_path, [[0.5, 0], [0, 0.5]], method=method, coefficients=(1.5, -0.5))
    [warning] = report.warnings
    assert "leave [0, 1] (m0: 1.5)" in warning


def test_a_model_of_another_training(tmp_path):
    """As long as the base, nearly at a right angle to it: weights that began elsewhere."""
    rng = np.random.default_rng(1)
    vectors = [rng.standard_normal(100), 0.1 * rng.standard_normal(100)]
    [warning] = [each for each in merged(tmp_path, vectors).warnings if "fine-tune of this base" in each]
    assert warning.startswith("m0 is ")
    assert any("m0 is" in each for each in mf.measure(tmp_path / "in/base", [tmp_path / "in/m0"]).warnings())


def test_a_pattern_that_excludes_nothing(tmp_path):
    [warning] = merged(tmp_path, [[0.5, 0], [0, 0.5]], exclude="embde|head").warnings
    assert warning == "--exclude 'embde|head' matches no tensor: all of them are merged"


def test_share_warnings_weigh_scopes_alike_and_skip_unsolved_ones():
    rows = np.array([[0.95, 0.03, 0.02], [0.0, 0.0, 0.0], [0.91, 0.09, 0.0]])
    [warning] = trust.share_warnings(LABELS, rows)
    assert warning.startswith("chat takes 93.0% of the weight")
    assert trust.share_warnings(LABELS, np.zeros((2, 3))) == []
    assert trust.share_warnings(("chat",), np.ones((1, 1))) == []
    assert trust.share_warnings(LABELS, np.array([[0.9, 0.1, 0.0]])) == []


def test_task_vector_warnings_name_every_pair():
    cosines = np.array([[1.0, 0.31, -0.5], [0.31, 1.0, 0.3], [-0.5, 0.3, 1.0]])
    warnings = trust.task_vector_warnings(LABELS, np.array([1.0, 2.0, 3.0]), cosines, 100.0)
    assert len(warnings) == 2
    assert "chat and math" in warnings[0]
    assert "chat and code" in warnings[1]
    zero = trust.task_vector_warnings(LABELS, np.array([1.0, 0.0, 3.0]), np.eye(3), 100.0)
    assert [w for w in zero if w.startswith("math equals the base")] == zero


def test_overflow_of_the_output_dtype_is_counted(tmp_path):
    states = random_states(61, [(BF16,)] * 2, {"layers.0.a": (10,), "layers.1.a": (10,)})
    for name, values in {"layers.0.a": [1e5, -7e4, 2.0], "layers.1.a": [65504.0, 65519.0, 65520.0]}.items():
        states[0][name] = tensor(np.ones(3), F32)
        states[1][name] = tensor(values, F32)
    base, models = write_family(tmp_path / "in", states)
    report = mf.merge(base, models, tmp_path / "out", dtype="f16", method="linear")
    found = [w for w in report.warnings if "too large" in w]
    assert len(found) == 2
    assert found[0].startswith("2 elements of tensor 'layers.0.a' are too large for the output dtype and became Inf")
    assert found[1].startswith("1 element")
    values = {name: each.values.tolist() for name, each in read_state(tmp_path / "out").items()}
    assert values == {"layers.0.a": [np.inf, -np.inf, 2.0], "layers.1.a": [65504.0, 65504.0, np.inf]}


def test_overflow_in_a_large_tensor_is_counted_over_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: 1)
    values = np.resize([1.0, 1e6], 600_000)
    base, models = write_family(tmp_path / "in", [{"a": tensor(np.ones(600_000), F32)}, {"a": tensor(values, F32)}])
    report = mf.merge(base, models, tmp_path / "out", dtype="f16")
    assert [w for w in report.warnings if w.startswith("300000 elements of tensor 'a'")]


def test_a_measurement_warns_the_same(tmp_path):
    states = [{"a": tensor(np.ones(2), F32)}, *({"a": tensor(1 + np.array(v), F32)} for v in ([0.5, 0.5], [0, 0.01]))]
    base, models = write_family(tmp_path / "in", states)
    measured, report = mf.measure(base, models), mf.merge(base, models, tmp_path / "out")
    assert len(measured.warnings()) == len(report.warnings) == 2
    assert measured.warnings() == report.warnings


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_sums_of_norms_that_overflow_end_the_merge(tmp_path, granularity):
    names = ("layers.0.a", "layers.0.b", "layers.1.a")
    states = [{name: tensor(np.full(3, value), F64) for name in names} for value in (0.0, 0.7e154)]
    base, models = write_family(tmp_path / "in", states)
    for work in (lambda: mf.merge(base, models, tmp_path / "out", granularity=granularity),
                 lambda: mf.measure(base, models)):  # fmt: skip
        with pytest.raises(mf.DataError, match="overflows float64"):
            work()
    assert not (tmp_path / "out").exists()


def test_overflow_of_a_wide_dtype_is_not_told_to_use_a_wide_dtype(tmp_path):
    report = merged(tmp_path, [[0.5, 0.25]], method="task_arithmetic", coefficients=1e39)
    [_, warning] = report.warnings
    assert warning == "2 elements of tensor 'a' are beyond the range of F32 and became Inf or NaN"


def with_nonfinite(folder):
    """A family in which the base has an Inf, and the second model a NaN and an Inf, in one tensor."""
    states = random_states(62, [(BF16,)] * 3, {"layers.0.a": (300,), "layers.1.a": (40,), "b": (7,)})
    for number, values in {0: {3: np.inf}, 2: {5: np.nan, 299: -np.inf}}.items():
        changed = states[number]["layers.0.a"].values.copy()
        for index, value in values.items():
            changed[index] = value
        states[number]["layers.0.a"] = tensor(changed)
    return write_family(folder, states)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("linear", {}),
        ("ties", {"density": 0.7}),
        ("dare_ties", {"density": 0.9, "rescale": False}),
    ],
)
def test_nonfinite_inputs_are_merged_if_they_are_allowed(tmp_path, method, parameters, backend):
    base, models = with_nonfinite(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(mf.DataError, match=r"holds NaN or Inf: .* to merge it all the same, --allow-nonfinite"):
        mf.merge(base, models, out, method=method, parameters=parameters, backend=backend)
    report = mf.merge(base, models, out, method=method, parameters=parameters, backend=backend, allow_nonfinite=True)
    state = read_state(out)
    assert np.isfinite(state["layers.1.a"].values).all()
    (places,) = np.nonzero(~np.isfinite(state["layers.0.a"].values))
    assert 5 in places
    assert set(places) <= {3, 5, 299}
    (warning,) = [warning for warning in report.warnings if "NaN or Inf" in warning]
    owners = "m1" if method == "linear" else "m1, the base"
    assert warning == (
        f"{len(places)} elements of tensor 'layers.0.a' are NaN or Inf, as elements of it are in {owners}"
    )
    verified = mf.verify(out, full=True)
    assert verified.ok, verified.problems


def test_what_has_no_norm_cannot_be_allowed(tmp_path):
    base, models = with_nonfinite(tmp_path / "in")
    with pytest.raises(mf.DataError, match="it has no norm, so --allow-nonfinite cannot help"):
        mf.merge(base, models, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(mf.DataError, match=r"use --exclude$"):  # and nothing that would not help
        mf.merge(base, models, tmp_path / "out")
    report = mf.merge(base, models, tmp_path / "out", allow_nonfinite=True, exclude=r"layers\.0")
    assert not [warning for warning in report.warnings if "NaN" in warning]


def test_the_option_to_allow_nonfinite_inputs(tmp_path):
    base, models = with_nonfinite(tmp_path / "in")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {models[0]}}}, {{model: {models[1]}}}]\nparameters: {{weight: 1}}\n"
    )
    merge = ["merge", str(base), *map(str, models), "-o", str(tmp_path / "a"), "--method", "linear"]
    for command in (merge, ["run", str(recipe), str(tmp_path / "b")]):
        assert CliRunner().invoke(cli, [*command, "--quiet"]).exit_code == 1
        result = CliRunner().invoke(cli, [*command, "--quiet", "--allow-nonfinite"])
        assert result.exit_code == 0, result.output
        assert "as elements of it are in m1" in " ".join(result.output.split())


@pytest.mark.parametrize("parameters", [{"exponent": 1.0}, {"exponent": 1.0, "coefficients": "metagpt"}])
def test_an_exponent_without_its_coefficients(parameters):
    recipe = make_recipe("base", ["a", "b"], method="ties", parameters={"density": 0.5, **parameters})
    warned = ["exponent has no effect without coefficients = metagpt"]
    assert recipe.method.warnings() == ([] if "coefficients" in parameters else warned)
