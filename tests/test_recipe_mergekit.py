"""Recipes as we resolve them and as mergekit plans them: same tensors, inputs, bases and values of parameters.

Needs ``pip install '.[mergekit]'``. No weights are merged: only mergekit's planner runs.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.recipe_file import load_recipe
from metagpt_fast.recipe_methods import find_recipe_method
from metagpt_fast.recipe_tensors import resolve_tensors

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others deprecate in it
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]' compares with mergekit")
    import transformers
    import yaml
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

pytestmark = pytest.mark.slow

NUM_LAYERS = 5
FAMILIES = ("llama", "gpt2")
MODELS = ("base", "a", "b", "c")
FILTERS = {
    "llama": ("self_attn", "mlp", "layers.1", "norm", "embed", "lm_head", "*", ".0.", "nothing"),
    "gpt2": ("attn", "mlp.c_fc", "h.1", "ln", "wte", "*", ".0.", "bias", "nothing"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four models of each family, as transformers saves them; the weights are of no interest."""
    folder = tmp_path_factory.mktemp("families")
    common = {"vocab_size": 24}
    configs = {
        "llama": transformers.LlamaConfig(
            **common, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=NUM_LAYERS
        ),
        "gpt2": transformers.GPT2Config(**common, n_embd=8, n_head=2, n_layer=NUM_LAYERS, n_positions=16),
    }
    for family, config in configs.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name in MODELS:
            model.save_pretrained(folder / f"{family}-{name}")
    return folder


def mergekit_plan(
    text: str,
) -> dict[str, tuple[list[tuple[str, str]], str | None, dict[str, Any], list[dict[str, Any]]]]:
    """Return mergekit's plan by output tensor: (model, input name)s, base, shared values, each input's own."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    LoaderCache().setup(options)
    LoaderCache().loaders.clear()
    arch = get_architecture_info(config, options)
    out_config = (config.base_model or config.referenced_models()[0]).config()
    if config.slices:
        num_layers = sum(s.sources[0].layer_range[1] - s.sources[0].layer_range[0] for s in config.slices)
        key = "n_layer" if out_config.model_type == "gpt2" else "num_hidden_layers"
        setattr(out_config, key, num_layers)
    planner = MergePlanner(config, arch, options, out_config)
    planner._plan()
    plan = {}
    for weight, task in planner._tensors:
        inputs = [(str(model), name_of(task, model)) for model in task.model_order]
        base = None if task.base_model is None else str(task.base_model)
        own = [dict(task.input_parameters[model].items()) for model in task.model_order]
        plan[weight.name] = (inputs, base, dict(task.parameters.items()), own)
    return plan


def name_of(task: Any, model: Any) -> str:
    """Return the name that the model's file has, of those that mergekit looks for."""
    info = task.gather_tensors.weight_info[model]
    return next(
        name for name in (info.name, *(info.aliases or ())) if name in LoaderCache().get(model).index.tensor_paths
    )


def our_plan(path: Path) -> dict[str, tuple[list[tuple[str, str]], str | None, dict[str, Any], list[dict[str, Any]]]]:
    recipe = load_recipe(path)
    method = find_recipe_method(recipe)
    resolved = resolve_tensors(recipe, method, [open_checkpoint(model) for model in recipe.models])
    plan = {}
    for tensor in resolved.tensors:
        inputs = [(str(recipe.models[each.model]), each.source.name) for each in tensor.inputs]
        base = None if tensor.base is None else inputs[tensor.base][0]
        plan[tensor.name] = (inputs, base, dict(tensor.parameters), [dict(each.parameters) for each in tensor.inputs])
    return plan


def assert_same(path: Path) -> None:
    ours, theirs = our_plan(path), mergekit_plan(path.read_text(encoding="utf-8"))
    ignores_base = find_recipe_method(load_recipe(path)).base == "ignored"
    assert ours.keys() == theirs.keys()
    for name, (inputs, base, shared, own) in ours.items():
        their_inputs, their_base, their_shared, their_own = theirs[name]
        assert inputs == their_inputs
        if not ignores_base:
            assert base == their_base
        # mergekit's methods have parameters without effect, such as density in task_arithmetic; ours have a few more.
        assert {key: value for key, value in shared.items() if key in their_shared} == {
            key: value for key, value in their_shared.items() if key in shared
        }
        for mine, other in zip(own, their_own, strict=True):
            assert mine == {key: value for key, value in other.items() if key in mine}
            assert bool(mine) == bool(other)


class Writer:
    """Random recipes that both understand."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.family = self._random.choice(FAMILIES)

    def recipe(self) -> dict[str, Any]:
        choose = self._random.choice
        method = choose(["task_arithmetic", "ties", "breadcrumbs", "della", "linear"])
        recipe: dict[str, Any] = {"merge_method": method, "parameters": {"weight": self.setting(is_complete=True)}}
        names = self._random.sample(MODELS[1:], self._random.randint(1, 3))
        has_base = method != "linear"
        if has_base:
            recipe["base_model"] = self.path("base")
            self.more(recipe["parameters"], method)
        if choose([True, False]):
            listed = [*names, *(["base"] if has_base and choose([True, False]) else [])]
            self._random.shuffle(listed)
            recipe["models"] = [self.with_settings({"model": self.path(name)}, name, method) for name in listed]
            return recipe
        recipe["slices"] = [
            self.slice(method, [*names, *(["base"] if has_base else [])]) for _ in range(choose([1, 2, 3]))
        ]
        return recipe

    def slice(self, method: str, names: list[str]) -> dict[str, Any]:
        num_layers = self._random.randint(1, NUM_LAYERS)
        sources = []
        for name in self._random.sample(names, len(names)):
            first = self._random.randint(0, NUM_LAYERS - num_layers)
            source = {"model": self.path(name), "layer_range": [first, first + num_layers]}
            sources.append(self.with_settings(source, name, method))
        made: dict[str, Any] = {"sources": sources}
        if self._random.random() < 0.5:
            made["parameters"] = {"weight": self.setting(is_complete=False)}
            if method != "linear":
                self.more(made["parameters"], method)
        return made

    def with_settings(self, entry: dict[str, Any], name: str, method: str) -> dict[str, Any]:
        if name != "base" and self._random.random() < 0.7:
            entry["parameters"] = {"weight": self.setting(is_complete=False)}
            if method in {"ties", "breadcrumbs", "della"}:
                entry["parameters"]["density"] = self.setting(is_complete=False)
        return entry

    def more(self, parameters: dict[str, Any], method: str) -> None:
        if self._random.random() < 0.5:
            parameters["lambda"] = self.setting(is_complete=False)
        if self._random.random() < 0.5:
            parameters["normalize"] = self._random.choice(
                [True, False, 1, "no", [True, False], {"filter": "mlp", "value": 0}]
            )
        if self._random.random() < 0.5:
            parameters["int8_mask"] = True
        if method != "task_arithmetic" and self._random.random() < 0.5:
            parameters["density"] = self.setting(is_complete=False)

    def path(self, name: str) -> str:
        return f"{self.family}-{name}"

    def value(self) -> Any:
        numbers = [0, 1, 0.25, 0.7, "1e-3", "0.5", round(self._random.random(), 3)]
        if self._random.random() < 0.5:
            return self._random.choice(numbers)
        return self._random.choices(numbers, k=self._random.randint(1, 5))

    def setting(self, *, is_complete: bool) -> Any:
        """Return a scalar, a gradient, a condition or several; with ``is_complete`` one for every tensor."""
        if self._random.random() < 0.4:
            return self.value()
        conditions = [
            {"filter": self._random.choice(FILTERS[self.family]), "value": self.value()}
            for _ in range(self._random.randint(1, 3))
        ]
        if is_complete:
            conditions.append({"value": self.value()})
        return conditions[0] if len(conditions) == 1 and self._random.random() < 0.5 else conditions


@pytest.mark.parametrize("seed", range(120))
def test_random_recipes(folder, monkeypatch, seed):
    monkeypatch.chdir(folder)
    writer = Writer(seed)
    path = folder / f"{seed}.yaml"
    path.write_text(yaml.safe_dump(writer.recipe(), sort_keys=False), encoding="utf-8")
    assert_same(path)


@pytest.mark.parametrize(
    "text",
    [
        # Layers of one model after those of another; GPT-2's embeddings of the first, its head of the last.
        """
merge_method: passthrough
slices:
- sources: [{model: gpt2-a, layer_range: [0, 3]}]
- sources: [{model: gpt2-b, layer_range: [1, 5], parameters: {scale: [0.5, 1]}}]
""",
        """
merge_method: passthrough
slices:
- sources: [{model: llama-a, layer_range: [0, 1], parameters: {scale: {filter: o_proj, value: 0.0}}}]
- sources: [{model: llama-b, layer_range: [4, 5]}]
""",
        """
merge_method: slerp
base_model: llama-a
slices:
- sources: [{model: llama-a, layer_range: [0, 5]}, {model: llama-b, layer_range: [0, 5]}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
""",
        """
merge_method: nuslerp
models: [{model: llama-a, parameters: {weight: 0.4}}, {model: llama-b, parameters: {weight: [0, 2]}}]
parameters: {nuslerp_row_wise: [no, yes]}
""",
        """
merge_method: karcher
base_model: llama-base
models: [{model: llama-a}, {model: llama-b}]
parameters: {max_iter: [10, 50], tol: 1e-6}
""",
    ],
)
def test_recipes_as_people_write_them(folder, monkeypatch, text, tmp_path):
    monkeypatch.chdir(folder)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert_same(path)
