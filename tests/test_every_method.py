"""Every method through the whole merge: same bytes whatever the settings, in files as in memory, and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.methods import METHODS

from .arrays import decode
from .checkpoints import random_states, read_state, tensor_bytes, write_family
from .kernel_calls import kernels
from .method_cases import CASES, DTYPES, NUM_MODELS, SETTINGS, SHAPES, merge

# How far apart neighbours may be, relative to the value; in the wide dtypes, what sums in other precision make of it.
NEIGHBOUR = {BF16: 2.0**-7, F16: 2.0**-10, F32: 2e-6, F64: 2e-6}


def case_id(case):
    return str(case) if isinstance(case, str) else ",".join(f"{key}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(
        tmp_path_factory.mktemp("family"), random_states(5, DTYPES, SHAPES), num_shards=2, misalignment=3
    )


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    """Return how a case is merged with one thread, all in one batch; each case once."""
    base, models = family
    known: dict[str, dict[str, bytes]] = {}

    def expected(method: str, parameters: dict[str, object]) -> dict[str, bytes]:
        key = method + case_id(parameters)
        if key not in known:
            out = tmp_path_factory.mktemp("merged") / "out"
            merge(base, models, out, method, parameters, threads=1)
            known[key] = tensor_bytes(out)
        return known[key]

    return expected


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=case_id)
@pytest.mark.parametrize(
    "settings", [{"threads": 3}, {"io": "pread", "threads": 2}, {"isa": "scalar"}, {"window": 70_000}], ids=str
)
def test_same_bytes(family, merged, tmp_path, monkeypatch, method, parameters, settings):
    base, models = family
    settings = dict(settings)
    if (window := settings.pop("window", None)) is not None:
        monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: window)
    with kernels(isa=settings.pop("isa", mf.isa())):
        merge(base, models, tmp_path / "out", method, parameters, **settings)
    assert tensor_bytes(tmp_path / "out") == merged(method, parameters)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=case_id)
def test_the_reference_backend_agrees(family, merged, tmp_path, method, parameters):
    """Within what λ, rescaling and rounding may differ by; the kernels' own tests compare bit for bit."""
    base, models = family
    merge(base, models, tmp_path / "out", method, parameters, backend="reference")
    ours, theirs = merged(method, parameters), tensor_bytes(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    # Sums differ by some 1e-7, and with them coefficients: an element may be rounded to the neighbour.
    for name, tensor in read_state(tmp_path / "out").items():
        a, b = (decode(np.frombuffer(each[name], np.uint8), tensor.dtype) for each in (ours, theirs))
        assert np.all(np.abs(a - b) <= NEIGHBOUR[tensor.dtype] * np.abs(b) + 1e-8), name
        if tensor.dtype in {BF16, F16}:
            assert np.count_nonzero(a != b) <= 2 + 0.001 * a.size, name


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=case_id)
def test_in_memory_as_in_files(family, merged, method, parameters):
    import ml_dtypes

    _, models = family
    chosen = models[: NUM_MODELS.get(method, len(models))]
    numpy_types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    states = random_states(5, DTYPES, SHAPES)[: 1 + len(chosen)]
    arrays = [
        {name: t.raw.view(numpy_types[t.dtype.name]).reshape(t.shape) for name, t in state.items()} for state in states
    ]
    result = mf.merge_state_dicts(arrays[0], arrays[1:], method=method, parameters=parameters)
    expected = merged(method, parameters)
    for name, array in result.items():
        assert np.ascontiguousarray(array).tobytes() == expected[name], name


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=case_id)
def test_into_the_bases_own_memory(family, merged, method, parameters):
    import ml_dtypes

    del family
    numpy_types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    states = random_states(5, DTYPES, SHAPES)[: 1 + NUM_MODELS.get(method, 3)]
    arrays = [
        {name: t.raw.copy().view(numpy_types[t.dtype.name]).reshape(t.shape) for name, t in state.items()}
        for state in states
    ]
    mf.merge_state_dicts(arrays[0], arrays[1:], method=method, parameters=parameters, out=arrays[0])
    expected = merged(method, parameters)
    for name, array in arrays[0].items():
        assert array.tobytes() == expected[name], name


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].base == "required"])
def test_models_that_equal_the_base_leave_it(tmp_path, method):
    states = random_states(5, [DTYPES[0]], SHAPES) * (1 + NUM_MODELS.get(method, 3))
    base, models = write_family(tmp_path / "in", states)
    try:
        mf.merge(base, models, tmp_path / "out", method=method, parameters=SETTINGS.get(method))
    except mf.DataError as error:
        assert "every model equals the base" in str(error)
    else:
        assert tensor_bytes(tmp_path / "out") == {name: t.raw.tobytes() for name, t in states[0].items()}


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_metagpts_coefficients_of_pruned_vectors(family, tmp_path, granularity):
    """λ_t ∝ Σ over the scope of the squares of what is merged: computed again from the outputs of single models."""
    base, models = family
    settings = {"method": "ties", "parameters": {"density": 0.3}, "dtype": "f64"}
    report = mf.merge(base, models, tmp_path / "out", granularity=granularity, coefficients="metagpt", **settings)
    states = random_states(5, DTYPES, SHAPES)
    squares: dict[str, list[np.ndarray]] = {}
    for name in SHAPES:
        row = []
        for model in states[1:]:
            delta = np.float64(np.float32(model[name].values - states[0][name].values))
            kept = np.sort(np.abs(delta.astype(np.float32)))[::-1][: max(1, int(0.3 * delta.size))]
            row.append(np.sum(np.float64(kept) ** 2))
        scope = {"model": "model", "layer": name.split(".")[1] if "layers" in name else name, "tensor": name}[
            granularity
        ]
        squares.setdefault(scope, []).append(np.array(row))
    for scope, coefficients in zip(report.scopes, report.coefficients, strict=True):
        key = scope.split(".")[-1] if granularity == "layer" and "layers" in scope else scope
        total = np.sum(squares[key], axis=0)
        expected = total / total.sum() if total.sum() > 0 else np.zeros(3)
        np.testing.assert_allclose(coefficients, expected, rtol=1e-5)


def test_raw_vectors_on_request(family, tmp_path):
    base, models = family
    raw = mf.merge(
        base, models, tmp_path / "a", method="ties", coefficients="metagpt",
        parameters={"density": 0.3, "coefficients_from": "raw"},
    )  # fmt: skip
    plain = mf.merge(base, models, tmp_path / "b", method="metagpt")
    np.testing.assert_allclose(raw.coefficients, plain.coefficients, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_the_masks(family, tmp_path, seed):
    base, models = family
    out = {}
    for number in range(2):
        path = tmp_path / str(number)
        mf.merge(base, models, path, method="dare_linear", parameters={"density": 0.5, "seed": seed})
        out[number] = tensor_bytes(path)
    assert out[0] == out[1]
    mf.merge(base, models, tmp_path / "other", method="dare_linear", parameters={"density": 0.5, "seed": 7})
    assert tensor_bytes(tmp_path / "other") != out[0]


def test_granularity_where_it_means_nothing_is_refused(family, tmp_path):
    base, models = family
    with pytest.raises(mf.RecipeError, match="works tensor by tensor"):
        mf.merge(base, models, tmp_path / "out", method="ties", granularity="layer")


def test_nan_in_a_model_is_refused(tmp_path):
    states = random_states(5, DTYPES, SHAPES)
    raw = states[1]["layers.1.b.weight"].raw
    raw[:2] = (0xC0, 0x7F)  # BF16 NaN
    base, models = write_family(tmp_path / "in", states)
    for method in ("ties", "sce", "ram", "della"):
        with pytest.raises(mf.DataError, match="holds NaN or Inf"):
            mf.merge(
                base,
                models,
                tmp_path / method,
                method=method,
                parameters=SETTINGS[method] | {"density": 0.5} if method in {"ties", "della"} else SETTINGS[method],
            )
        assert not (tmp_path / method).exists()
