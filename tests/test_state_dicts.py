"""merge_state_dicts: tensors in memory give the bytes that files give."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, F16, F32, F64, OUTPUT_DTYPES

from .checkpoints import I64, integers, random_states, read_state, tensor, write_family

NUMPY_DTYPES = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16, F64: np.float64, I64: np.int64}
TORCH_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, F64: torch.float64, I64: torch.int64}


def to_numpy(each):
    return each.raw.copy().view(NUMPY_DTYPES[each.dtype]).reshape(each.shape)


def to_torch(each):
    made = torch.empty(each.shape, dtype=TORCH_DTYPES[each.dtype])
    made.reshape(-1).view(torch.uint8).numpy()[:] = each.raw
    return made


def to_gradient(each):
    made = to_torch(each)
    return made.requires_grad_() if each.dtype is not I64 else made


def to_parameter(each):
    return torch.nn.Parameter(to_torch(each), requires_grad=each.dtype is not I64)


def raw_of(array):
    if isinstance(array, torch.Tensor):
        return array.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return array.tobytes()


@pytest.fixture(params=[to_numpy, to_torch, to_gradient, to_parameter])
def convert(request):
    return request.param


def make_states(dtypes=((BF16, F32, F16, F64), (BF16,), (F32, BF16), (F16,))):
    """Four checkpoints with what a merge of files treats apart: integers, unchanged tensors, no dimensions."""
    states = random_states(91, dtypes)
    for state in states:
        state["model.layers.0.ids"] = integers([4, 5])
        state["model.layers.1.frozen"] = tensor([-0.0, 1.0, 0.0], F32)
    return states


def make_dicts(convert):
    """The same as a base and three models in memory."""
    base, *models = [{name: convert(each) for name, each in state.items()} for state in make_states()]
    return base, models


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "layer"},
        {"granularity": "tensor", "exponent": -1},
        {"dtype": "f16"},
        {"method": "task_arithmetic", "coefficients": (0.5, -0.1, 0.2)},
        {"method": "linear"},
        {"exclude": "lm_head|layers.1.", "dtype": "f32"},
    ],
    ids=str,
)
def test_equals_the_merge_of_files(convert, tmp_path, settings):
    base, models = write_family(tmp_path / "in", make_states())
    mf.merge(base, models, tmp_path / "out", **settings)
    expected = read_state(tmp_path / "out")
    base, models = make_dicts(convert)
    merged = mf.merge_state_dicts(base, models, **settings)
    assert list(merged) == list(base)
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        assert tuple(array.shape) == expected[name].shape
        assert raw_of(array) == expected[name].raw.tobytes(), name


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
def test_new_tensors_are_of_the_bases_library(convert, dtype):
    base, models = make_dicts(convert)
    dtypes = NUMPY_DTYPES if convert is to_numpy else TORCH_DTYPES
    for name, array in mf.merge_state_dicts(base, models, dtype=dtype).items():
        if name.endswith("ids"):
            assert array is base[name]
        else:
            assert isinstance(array, np.ndarray if convert is to_numpy else torch.Tensor)
            assert array.dtype == dtypes[OUTPUT_DTYPES[dtype]]


def test_libraries_may_be_mixed():
    base, models = make_dicts(to_numpy)
    expected = mf.merge_state_dicts(base, models)
    merged = mf.merge_state_dicts(base, make_dicts(to_torch)[1])
    assert all(raw_of(merged[name]) == raw_of(array) for name, array in expected.items())


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_updates_the_base_in_place(convert, granularity):
    base, models = make_dicts(convert)
    expected = mf.merge_state_dicts(base, models, granularity=granularity)
    merged = mf.merge_state_dicts(base, models, granularity=granularity, out=base)
    for name, array in base.items():
        assert merged[name] is array
        assert raw_of(array) == raw_of(expected[name])


def test_writes_into_out_and_leaves_the_inputs():
    base, models = make_dicts(to_numpy)
    before = [{name: raw_of(array) for name, array in state.items()} for state in (base, *models)]
    out = {name: np.full_like(array, 9, dtype=np.float64) for name, array in base.items()}
    merged = mf.merge_state_dicts(base, models, out=out)
    assert all(merged[name] is out[name] for name in base if not name.endswith("ids"))
    assert not any(np.any(array == 9) for name, array in out.items() if not name.endswith("ids"))
    assert [{name: raw_of(array) for name, array in state.items()} for state in (base, *models)] == before


def test_backends_and_threads_agree():
    base, models = make_dicts(to_numpy)
    expected = mf.merge_state_dicts(base, models, threads=1, method="task_arithmetic")
    for settings in ({"threads": 3}, {"backend": "reference"}):
        merged = mf.merge_state_dicts(base, models, method="task_arithmetic", **settings)
        assert all(raw_of(merged[name]) == raw_of(array) for name, array in expected.items())


ONES = {"layers.0.a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}
TWOS = {name: array * 2 for name, array in ONES.items()}


def refused(error, base, *models, **settings):
    with pytest.raises(error) as caught:
        mf.merge_state_dicts(base, models, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"b": None}, mf.PlanError, ("models[1]", "'b' is missing", "exclude=")),
        ({"c": np.ones(1)}, mf.PlanError, ("models[1]", "'c' is not in the base", "exclude=")),
        ({"b": np.ones(5, np.float32)}, mf.PlanError, ("models[1]", "'b'", "got [5]", "expected [2, 2]")),
        ({"b": np.ones((2, 2), np.int64)}, mf.RecipeError, ("'b'", "models[1]", "got int64")),
        ({"b": np.ones((2, 4), np.float32)[:, ::2]}, mf.RecipeError, ("'b'", "models[1]", "not contiguous")),
        ({"b": [[1.0, 2.0], [3.0, 4.0]]}, mf.RecipeError, ("'b'", "models[1]", "not an array", "got list")),
    ],
    ids=["missing", "extra", "shape", "integers", "strided", "list"],
)
def test_tensors_that_do_not_fit(change, error, says):
    model = {name: array for name, array in {**ONES, **change}.items() if array is not None}
    message = str(refused(error, ONES, TWOS, model))
    for part in says:
        assert part in message


@pytest.mark.parametrize("settings", [{}, {"method": "task_arithmetic"}, {"method": "linear"}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nonfinite_weights(settings, value, which):
    states = [{name: array * (1 + t) for name, array in ONES.items()} for t in range(3)]
    states[which]["layers.0.a"][2] = value
    if which == 0 and settings.get("method") == "linear":  # which does not look at the base
        mf.merge_state_dicts(states[0], states[1:], **settings)
        return
    before = states[0]["b"].copy()
    error = refused(mf.DataError, *states, out=states[0], **settings)
    owner = "the base" if which == 0 else f"models[{which - 1}]"
    assert f"tensor 'layers.0.a' of {owner} holds NaN or Inf" in str(error)
    assert error.got == "1 such elements, the first at index 2"
    np.testing.assert_array_equal(states[0]["b"], before)  # found before anything was written


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_integers_have_to_agree(make):
    base = {**ONES, "ids": make(3)}
    merged = mf.merge_state_dicts(base, [{**TWOS, "ids": make(3)}])
    assert merged["ids"] is base["ids"]
    for other in (make(4), make(3) + 1, make(3) * 1.0, [0, 1]):
        error = refused(mf.PlanError, base, {**TWOS, "ids": other})
        assert "'ids'" in error.what
        assert error.where == "models[0]"
        assert "exclude" in error.hint
    merged = mf.merge_state_dicts(base, [{**TWOS, "ids": make(7)}], exclude="ids")
    assert merged["ids"] is base["ids"]


def test_norms_that_overflow_are_not_taken_for_nan():
    huge = {name: array.astype(np.float64) * 1e200 for name, array in TWOS.items()}
    assert "overflows float64" in refused(mf.DataError, ONES, huge).what


def test_sums_of_norms_that_overflow_are_refused():
    zeros = {name: np.zeros(3) for name in "ab"}
    huge = {name: np.full(3, 0.7e154) for name in "ab"}  # 1.5e308 each, 2.9e308 together
    assert "overflows float64" in refused(mf.DataError, zeros, huge, huge).what


def test_other_refusals():
    assert "every model equals the base" in str(refused(mf.DataError, ONES, ONES, dict(ONES)))
    refused(mf.RecipeError, ONES)
    refused(mf.RecipeError, ONES, TWOS, granularity="row")
    refused(mf.RecipeError, ONES, TWOS, dtype="f16", out=ONES)
    assert "nothing to merge" in refused(mf.PlanError, ONES, TWOS, exclude=".").what


def test_outputs_that_do_not_fit_are_found_before_any_is_written():
    written = {name: array.copy() for name, array in ONES.items()}
    assert refused(mf.PlanError, ONES, TWOS, out={"layers.0.a": written["layers.0.a"]}).where == "out"
    short = {**written, "b": np.ones(3, np.float32)}
    assert refused(mf.PlanError, ONES, TWOS, out=short).expected == "[2, 2], as in the base"
    written["b"].flags.writeable = False
    assert "read-only" in str(refused(mf.RecipeError, ONES, TWOS, out=written))
    np.testing.assert_array_equal(written["layers.0.a"], ONES["layers.0.a"])


def tied(value, dtype=np.float32):
    """Two names for one array, as a language model with tied embeddings has."""
    array = np.full(300_000, value, dtype)
    return {"embed": array, "layers.0.a": np.full(5, value, dtype), "lm_head": array}


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("method", ["metagpt", "task_arithmetic", "linear"])
def test_tied_tensors_are_updated_once(method, granularity):
    settings = {"method": method, "granularity": granularity}
    base, models = tied(1.0), [tied(2.0), tied(4.0)]
    expected = mf.merge_state_dicts(base, models, **settings)
    merged = mf.merge_state_dicts(base, models, out=base, **settings)
    assert merged["embed"] is merged["lm_head"] is base["embed"]
    for name, array in expected.items():
        np.testing.assert_array_equal(merged[name], array)


def test_outputs_that_would_change_another_tensor_are_refused():
    base, array = tied(1.0), np.ones(12, np.float32)
    untied = {name: each.copy() for name, each in tied(2.0).items()}
    for arguments, settings in (
        ((base, untied), {"out": base}),  # lm_head and embed differ in the model, and are one array in the output
        ((base, tied(2.0)), {"out": base, "exclude": "lm_head"}),
        (({"a": array[2:10]}, {"a": np.ones(8, np.float32)}), {"out": {"a": array[:8]}}),
        (({"a": np.ones(8, np.float32)}, {"a": array[2:10]}), {"out": {"a": array[:8]}}),
        (({"a": array[:6], "b": array[6:]}, {"a": array[:6] + 1, "b": array[6:] + 1}),
         {"out": {"a": array[6:], "b": array[:6]}}),
    ):  # fmt: skip
        error = refused(mf.RecipeError, *arguments, **settings)
        assert "shares memory" in error.what
    np.testing.assert_array_equal(base["embed"], 1)
    mf.merge_state_dicts({"a": array[:6]}, [{"a": array[:6] + 1}], out={"a": array[6:]})
    np.testing.assert_array_equal(array, [1] * 6 + [2] * 6)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, requires_grad=True),
        [0, [0]],
        None,
    ],
    ids=["bf16", "gradient", "ragged list", "none"],
)
def test_what_is_no_integer_tensor_differs_from_one(value):
    base = {**ONES, "ids": torch.zeros(2, dtype=torch.int64)}
    assert "'ids' differs" in refused(mf.PlanError, base, {**TWOS, "ids": value}).what


def test_tensors_without_memory_are_refused():
    empty = {"a": torch.empty(2, device="meta")}
    assert "meta" in str(refused(mf.RecipeError, empty, {"a": torch.ones(2)}))
    empty = {"ids": torch.empty(2, dtype=torch.int64, device="meta")}
    assert "meta" in str(refused(mf.RecipeError, {**ONES, **empty}, {**TWOS, **empty}))


def test_models_that_are_no_mappings_are_refused():
    for models in ([np.ones(3)], ["chat"], [None], [[ONES]]):
        assert refused(mf.RecipeError, ONES, *models).where == "models[0]"
    assert refused(mf.RecipeError, [np.ones(3)], ONES).where == "base"
    with pytest.raises(mf.RecipeError, match="a list of"):
        mf.merge_state_dicts(ONES, TWOS)
    assert refused(mf.RecipeError, {0: np.ones(3)}, {0: np.ones(3)}).got == "0"
