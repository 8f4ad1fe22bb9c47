"""merge_state_dicts: tensors in memory give the bytes that files give."""

from __future__ import annotations

import numpy as np
import pytest

import metagpt_fast as mf

torch = pytest.importorskip("torch")


def make_state_dicts(num_models=3, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.embed.weight": (16, 8), "model.layers.0.a": (33,), "model.layers.1.a": (5, 7)}
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    models = [
        {name: (value + torch.randn(value.shape, generator=generator) * 1e-3 * (t + 1)).to(dtype)
         for name, value in base.items()}
        for t in range(num_models)
    ]  # fmt: skip
    return {name: value.to(dtype) for name, value in base.items()}, models


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_equals_the_merge_of_files(granularity, tmp_path):
    from safetensors.torch import load_file, save_file

    base, models = make_state_dicts()
    paths = []
    for number, tensors in enumerate((base, *models)):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    mf.merge(paths[0], paths[1:], tmp_path / "out.safetensors", granularity=granularity)
    expected = load_file(tmp_path / "out.safetensors")
    merged = mf.merge_state_dicts(base, models, granularity=granularity)
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name])


def test_updates_the_base_in_place_and_takes_parameters():
    base, models = make_state_dicts()
    expected = mf.merge_state_dicts(base, models)
    live = {name: torch.nn.Parameter(value.clone()) for name, value in base.items()}
    merged = mf.merge_state_dicts(live, models, out=live)
    for name, value in live.items():
        assert merged[name] is value
        assert torch.equal(value.detach(), expected[name])


def test_numpy_arrays_and_integer_buffers():
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal(100).astype(np.float32), "ids": np.arange(4)}
    models = [{"w": base["w"] + np.float32(0.01) * (t + 1), "ids": base["ids"]} for t in range(2)]
    merged = mf.merge_state_dicts(base, models, method="task_arithmetic", coefficients=[0.5, 0.25])
    assert merged["ids"] is base["ids"]
    np.testing.assert_allclose(merged["w"], base["w"] + 0.01, atol=1e-6)


def test_errors_name_the_tensor():
    base, models = make_state_dicts()
    with pytest.raises(mf.DataError, match="equals the base"):
        mf.merge_state_dicts(base, [base, base])
    del models[1]["model.layers.0.a"]
    with pytest.raises(mf.PlanError, match=r"models\[1\].*model\.layers\.0\.a"):
        mf.merge_state_dicts(base, models)
    models[1]["model.layers.0.a"] = torch.full((33,), float("nan"), dtype=torch.bfloat16)
    with pytest.raises(mf.DataError, match=r"model\.layers\.0\.a.*NaN"):
        mf.merge_state_dicts(base, models)
