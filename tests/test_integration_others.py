"""FusionBench and sd-mecha with the kernels of this package, against merge_state_dicts; both are optional."""

from __future__ import annotations

import sys
import warnings
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import metagpt_fast
from metagpt_fast.errors import IntegrationError, RecipeError

torch = pytest.importorskip("torch")

SHAPES = {"embed.weight": (11, 8), "layers.0.w": (8, 8), "layers.0.b": (8,), "layers.1.w": (8, 8), "head.w": (11, 8)}


def states(dtype: Any = None) -> list[dict[str, Any]]:
    """Return the tensors of a base and two models."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = [
        {name: tensor + sigma * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for sigma in (0.02, 0.01)
    ]
    return [{name: tensor.to(dtype or torch.float32) for name, tensor in state.items()} for state in (base, *models)]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestFusionBench:
    @pytest.fixture(autouse=True)
    def algorithm(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what others deprecate in it
            pytest.importorskip("fusion_bench", reason="pip install '.[fusion_bench]'")
            import fusion_bench

            from metagpt_fast.integrations.fusion_bench import MetagptFastAlgorithm
        self.algorithm = MetagptFastAlgorithm
        self.bench = fusion_bench

    @pytest.fixture
    def modules(self) -> dict[str, Any]:
        """A pool's models: layers with weights and biases, and an integer buffer."""
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
        pool = {"_pretrained_": base}
        for name in ("a", "b"):
            pool[name] = deepcopy(base)
            with torch.no_grad():
                for parameter in pool[name].parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        return pool

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"granularity": "layer", "exponent": 1.0},
            {"method": "task_arithmetic", "coefficients": [0.3, 0.4]},
            {"method": "ties", "coefficients": "metagpt", "parameters": {"density": 0.5}},
        ],
    )
    def test_a_pool_of_modules(self, modules, arguments):
        expected = metagpt_fast.merge_state_dicts(
            modules["_pretrained_"].state_dict(), [modules[name].state_dict() for name in ("a", "b")], **arguments
        )
        expected = {name: tensor.clone() for name, tensor in expected.items()}
        before = deepcopy(modules["_pretrained_"].state_dict())
        algorithm = self.algorithm(**arguments, inplace=False)
        merged = algorithm.run(self.bench.BaseModelPool(modules))
        assert equal(merged.state_dict(), expected)
        assert equal(modules["_pretrained_"].state_dict(), before)
        assert self.algorithm(**arguments).run(modules) is modules["_pretrained_"]
        assert equal(modules["_pretrained_"].state_dict(), expected)

    def test_it_is_made_from_a_configuration(self, modules, tmp_path):
        from fusion_bench.utils import instantiate
        from omegaconf import OmegaConf

        algorithm = self.algorithm(method="task_arithmetic", coefficients=[0.1, 0.2], parameters={"normalize": True})
        algorithm.to_yaml(tmp_path / "method.yaml")
        config = OmegaConf.load(tmp_path / "method.yaml")
        assert config._target_ == "metagpt_fast.integrations.fusion_bench.MetagptFastAlgorithm"
        again = instantiate(config)
        assert equal(again.run(deepcopy(modules)).state_dict(), algorithm.run(deepcopy(modules)).state_dict())

    def test_a_pool_of_files(self, tmp_path):
        from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool
        from safetensors.torch import save_file

        paths = {}
        for name, state in zip(("_pretrained_", "a", "b"), states(torch.bfloat16), strict=True):
            paths[name] = str(tmp_path / name)
            Path(paths[name]).mkdir()
            save_file(state, tmp_path / name / "model.safetensors")
        merged = self.algorithm().run(LazyStateDictPool(paths))
        base, *models = states(torch.bfloat16)
        assert equal(merged, metagpt_fast.merge_state_dicts(base, models))

    def test_a_pool_without_a_base(self, modules):
        del modules["_pretrained_"]
        with pytest.raises(IntegrationError, match="_pretrained_"):
            self.algorithm().run(modules)

    def test_unknown_methods(self, modules):
        with pytest.raises(RecipeError, match="unknown method"):
            self.algorithm(method="magic").run(modules)

    def test_other_versions(self, monkeypatch):
        check_versions(monkeypatch, "fusion_bench")


class TestSdMecha:
    @pytest.fixture(autouse=True)
    def sd_mecha(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.mecha = pytest.importorskip("sd_mecha", reason="pip install '.[sd_mecha]'")
            from metagpt_fast.integrations import sd_mecha

        self.methods = {name: getattr(sd_mecha, name) for name in sd_mecha.__all__}

    def merge(self, recipe: Any, dtype: Any) -> dict[str, Any]:
        merged = dict(self.mecha.merge(recipe, merge_dtype=dtype, output_dtype=dtype, threads=2))
        merged.pop("__metadata__", None)
        return merged

    @pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_as_merge_state_dicts(self, granularity, dtype, tmp_path):
        from safetensors.torch import save_file

        base, *models = states(getattr(torch, dtype))
        paths = []
        for number, state in enumerate((base, *models)):
            paths.append(tmp_path / f"{number}.safetensors")
            save_file(state, paths[-1])
        method = self.methods["metagpt" if granularity == "model" else f"metagpt_{granularity}"]
        recipe = method(*(self.mecha.model(path) for path in paths), exponent=1.5)
        expected = metagpt_fast.merge_state_dicts(base, models, granularity=granularity, exponent=1.5)
        assert equal(self.merge(recipe, getattr(torch, dtype)), expected)

    def test_a_recipe_in_a_file(self):
        base, *models = states()
        recipe = self.methods["metagpt"](self.mecha.literal(base), *(self.mecha.literal(model) for model in models))
        assert equal(self.merge(recipe, torch.float32), metagpt_fast.merge_state_dicts(base, models))

    def test_other_versions(self, monkeypatch):
        check_versions(monkeypatch, "sd_mecha")


def check_versions(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A version that was not tested is an error when the module is imported."""
    import importlib

    name = f"metagpt_fast.integrations.{module}"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(metadata, "version", lambda _: "99.0")
    with pytest.raises(IntegrationError, match="got 99"):
        importlib.import_module(name)
