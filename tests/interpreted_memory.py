"""Tensors in memory merged by the Triton backend, in Triton's interpreter; run by test_triton_interpreted.py.

Torch's tensors on the CPU stand for those of a GPU: all but the upload of tables is the path that a GPU takes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metagpt_fast as mf
from metagpt_fast import ops
from metagpt_fast.backends.triton import TritonBackend

NAMES = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.layers.1.norm", "head"]
SHAPES = [(40, 70), (30, 3), (50, 50), (9,), (60, 60)]
DTYPES = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64, torch.float16]


def make_models(seed=0, num_models=2):
    """A base and models, with integers, a tensor that no model changed and two names for one tensor."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape, dtype in zip(NAMES, SHAPES, DTYPES, strict=True)
    }
    models = [
        {
            name: (each + 0.1 * torch.randn(each.shape, generator=generator)).to(each.dtype)
            for name, each in base.items()
        }
        for _ in range(num_models)
    ]
    for state in (base, *models):
        state["model.layers.0.ids"] = torch.arange(3)
        state["model.layers.1.frozen"] = torch.tensor([-0.0, 1.0, 0.0])
        state["tied"] = state["head"]
    return base, models


def same_bits(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same(merged, expected):
    assert list(merged) == list(expected)
    wrong = [name for name in merged if not same_bits(merged[name], expected[name])]
    assert not wrong


def waits(*_):
    raise AssertionError("this returns arrays of the host, and so waits for the device")


@pytest.mark.parametrize(
    ("granularity", "exponent"), [("model", 2.0), ("layer", 2.0), ("tensor", 2.0), ("tensor", -1.0), ("model", 0.0)]
)
def test_metagpt_never_returns_to_the_host(monkeypatch, granularity, exponent):
    for name in ("layer_gram", "layer_merge", "layer_nonfinite"):
        monkeypatch.setattr(TritonBackend, name, waits)
    base, models = make_models()
    arguments = {"granularity": granularity, "exponent": exponent}
    expected = mf.merge_state_dicts(base, models, **arguments, backend="reference")
    merged = mf.merge_state_dicts(base, models, **arguments, backend="triton")
    assert list(merged) == list(expected)
    for name, each in merged.items():
        torch.testing.assert_close(
            each, expected[name], rtol=2.0 ** (-7 if each.dtype is torch.bfloat16 else -10), atol=1e-6
        )
    assert same_bits(merged["model.layers.1.frozen"], base["model.layers.1.frozen"])
    assert merged["model.layers.0.ids"] is base["model.layers.0.ids"]


def test_metagpt_into_the_base_itself():
    base, models = make_models()
    expected = mf.merge_state_dicts(base, models, granularity="layer", backend="triton")
    merged = mf.merge_state_dicts(base, models, granularity="layer", backend="triton", out=base)
    assert all(merged[name] is base[name] for name in base)
    assert_same(merged, expected)


def test_metagpt_where_nothing_changed_gives_the_base():
    base, _ = make_models()
    assert_same(mf.merge_state_dicts(base, [base, base], backend="triton"), base)


def test_metagpt_lets_nan_spread():
    base, models = make_models()
    models[1]["head"] = models[1]["head"].clone()
    models[1]["head"][3, 4] = torch.nan
    merged = mf.merge_state_dicts(base, models, granularity="tensor", backend="triton", exclude="tied")
    assert merged["head"].isnan().all()
    assert not merged["model.layers.0.a"].isnan().any()


EXACT = [
    ("task_arithmetic", {}),
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("dare_ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.05}),
    ("della", {"density": 0.5}),
]
SIMILAR = [("model_stock", {}), ("sce", {"select_topk": 0.4}), ("ram", {"epsilon": 0.001}), ("karcher", {})]


@pytest.mark.parametrize(("method", "parameters"), [*EXACT, *SIMILAR], ids=str)
def test_other_methods(method, parameters):
    base, models = make_models(1)
    for state in (base, *models):
        state["head"] = state["head"].clone()
    expected = mf.merge_state_dicts(base, models, method=method, parameters=parameters, backend="cpu")
    merged = mf.merge_state_dicts(base, models, method=method, parameters=parameters, backend="triton")
    if (method, parameters) in EXACT:
        assert_same(merged, expected)
    for name, each in merged.items():
        torch.testing.assert_close(
            each, expected[name], rtol=2.0 ** (-7 if each.dtype is torch.bfloat16 else -10), atol=1e-6
        )


def test_other_methods_refuse_nan():
    base, models = make_models()
    models[1]["model.layers.1.a"][3, 4] = torch.nan
    with pytest.raises(mf.DataError, match="NaN"):
        mf.merge_state_dicts(base, models, method="task_arithmetic", backend="triton")


def test_ops_take_and_return_tensors_of_the_device():
    base, models = make_models()
    bases, columns = [base[name] for name in NAMES], [[model[name] for name in NAMES] for model in models]
    gram = ops.layer_gram(bases, columns, backend="triton")
    assert isinstance(gram, torch.Tensor)
    np.testing.assert_allclose(gram.numpy(), ops.layer_gram(bases, columns, backend="reference"), rtol=1e-5, atol=1e-3)
    norms = gram.diagonal(dim1=1, dim2=2)[:, 1:]
    weights = norms / norms.sum(dim=1, keepdim=True)
    for coefficients in (weights, weights.numpy(), torch.tensor([0.25, 0.5], dtype=torch.float32), [0.25, 0.5]):
        merged = ops.layer_merge(bases, columns, coefficients, backend="triton")
        expected = ops.layer_merge(bases, columns, np.asarray(coefficients), backend="reference")
        assert all(same_bits(a, b) for a, b in zip(merged, expected, strict=True))
    out = [torch.empty_like(each) for each in bases]
    assert ops.layer_merge(bases, columns, weights, out, backend="triton") == out
    with pytest.raises(mf.RecipeError, match="shape"):
        ops.layer_merge(bases, columns, weights[:2], backend="triton")


def test_arrays_of_numpy_work_in_the_interpreter_too():
    base, models = np.ones(300, np.float32), np.full((1, 300), 3.0, np.float32)
    (merged,) = ops.layer_merge([base], [[models[0]]], [0.5], backend="triton")
    assert (merged == 2.0).all()
