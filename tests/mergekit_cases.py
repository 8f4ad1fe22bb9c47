"""Recipes that mergekit and we both run on one small family, and what the oracles say each tensor has to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import mask_oracles, method_oracles
from .method_oracles import FloatArray, Merged

NUM_LAYERS = 4
NAMES = ("base", "chat", "math", "code")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")

Arrays = Mapping[str, Mapping[str, FloatArray]]
"""Per model, per tensor, the weights."""


@dataclass(frozen=True)
class Case:
    """A recipe for whole models.

    Attributes:
        method: its name.
        models: the models it lists.
        shared: parameters of the merge, as the recipe has them.
        per_model: parameters of each model.
        base: the base, if the recipe has one.
        out_dtype: of the output.
        resolve: gives the values of parameters that differ by tensor, from the tensor's name.
        label: what is special about it.
        is_peer_near: whether mergekit's result can be compared with the oracle element by element. Not if it is float32
            whatever was asked for, and the mask is of quantities that float32 cannot resolve (arcee_fusion); nor if
            weights hang on which of some equal variances are selected (sce), which is one part in 1e4 of them here.
    """

    method: str
    models: Sequence[str] = NAMES[1:]
    shared: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    base: str | None = "base"
    out_dtype: str = "bfloat16"
    resolve: Callable[[str], Mapping[str, Any]] | None = None
    label: str = ""
    is_peer_near: bool = True

    @property
    def name(self) -> str:
        """The test's id."""
        return " ".join(filter(None, [self.method, self.label]))

    def recipe(self, folder: Path) -> dict[str, Any]:
        """Return the recipe, with the family in ``folder``."""
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "out_dtype": self.out_dtype}
        if self.base is not None:
            recipe["base_model"] = str(folder / self.base)
        recipe["models"] = [
            {"model": str(folder / model), "parameters": {name: each[i] for name, each in self.per_model.items()}}
            for i, model in enumerate(self.models)
        ]
        recipe["parameters"] = dict(self.shared)
        return recipe

    def expected(self, tensor: str, arrays: Arrays, **more: Any) -> Merged:
        """Return the oracle's word on a tensor of the output."""
        parameters = {**self.shared, **{name: list(each) for name, each in self.per_model.items()}}
        if self.resolve is not None:
            parameters |= self.resolve(tensor)
        # What has no influence, and what the masks of random methods stand for.
        unused = {"int8_mask", *(("density", "epsilon") if self.method in RANDOM else ())}
        parameters = {name: value for name, value in parameters.items() if name not in unused}
        parameters = {{"lambda": "lambda_"}.get(name, name): value for name, value in parameters.items()} | more
        oracle = getattr(method_oracles, self.method, None) or getattr(mask_oracles, self.method)
        base = None if self.base is None else arrays[self.base][tensor]
        return oracle(base, [arrays[model][tensor] for model in self.models], **parameters)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Slices:
    """A recipe that builds layers from ranges of several models.

    Attributes:
        name: the test's id.
        make: gives the recipe, from the family's folder.
        judge: gives the oracle's word, from a tensor's name and the weights.
    """

    name: str
    make: Callable[[Path], dict[str, Any]]
    judge: Callable[[str, Arrays], Merged]

    @property
    def out_dtype(self) -> str:
        """Return the dtype of the output."""
        return "bfloat16"

    @property
    def is_peer_near(self) -> bool:
        """Return that mergekit's result can be compared element by element."""
        return True

    def recipe(self, folder: Path) -> dict[str, Any]:
        """Return the recipe, with the family in ``folder``."""
        return {"dtype": "float32", "out_dtype": self.out_dtype, **self.make(folder)}

    def expected(self, tensor: str, arrays: Arrays) -> Merged:
        """Return the oracle's word on a tensor of the output."""
        return self.judge(tensor, arrays)


def layer_of(tensor: str) -> int | None:
    """Return the number of the decoder layer that has the tensor."""
    found = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def gradient(values: Sequence[float], tensor: str, num_layers: int = NUM_LAYERS) -> float:
    """Return the value at the tensor's layer; what lies outside of the layers has the first."""
    place = (layer_of(tensor) or 0) / (num_layers - 1)
    return float(np.interp(place, np.linspace(0, 1, len(values)), values))


def _in_layer(tensor: str, number: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{number}.", tensor)


def _stacked(tensor: str, arrays: Arrays) -> Merged:
    """The frankenmerge: layers 0 to 2 of chat, then layers 1 to 3 of math; what comes before from the first slice."""
    layer = layer_of(tensor)
    if layer is None:
        return method_oracles.passthrough(None, [arrays["chat" if "embed" in tensor else "math"][tensor]])
    model, source = ("chat", layer) if layer < 3 else ("math", layer - 2)
    return method_oracles.passthrough(None, [arrays[model][_in_layer(tensor, source)]])


def _shifted(tensor: str, arrays: Arrays) -> Merged:
    """Task arithmetic of two layers with two others, the second half with a weight of its own."""
    layer = layer_of(tensor)
    source = tensor if layer is None else _in_layer(tensor, layer + 1 if layer < 2 else layer)
    plain = tensor if layer is None else _in_layer(tensor, layer)
    is_second = "embed" not in tensor if layer is None else layer >= 2
    weights = [0.8, 0.4] if is_second else [0.3, 0.6]
    models = [arrays["chat"][plain], arrays["math"][source]]
    return method_oracles.task_arithmetic(arrays["base"][plain], models, weight=weights)


def _stacked_recipe(folder: Path) -> dict[str, Any]:
    return {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(folder / "chat"), "layer_range": [0, 3]}]},
            {"sources": [{"model": str(folder / "math"), "layer_range": [1, 4]}]},
        ],
    }


def _shifted_recipe(folder: Path) -> dict[str, Any]:
    def sources(base: list[int], math: list[int], weights: tuple[float, float]) -> dict[str, Any]:
        return {
            "sources": [
                {"model": str(folder / "base"), "layer_range": base},
                {"model": str(folder / "chat"), "layer_range": base, "parameters": {"weight": weights[0]}},
                {"model": str(folder / "math"), "layer_range": math, "parameters": {"weight": weights[1]}},
            ]
        }

    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "slices": [sources([0, 2], [1, 3], (0.3, 0.6)), sources([2, 4], [2, 4], (0.8, 0.4))],
    }


WEIGHTS = [0.5, 0.3, 0.7]
TWO = ("chat", "math")
ONE = ("chat",)
CASES = [
    Case("linear", base=None, per_model={"weight": WEIGHTS}),
    Case("linear", base=None, per_model={"weight": WEIGHTS}, shared={"normalize": False}, label="not normalized"),
    Case("linear", base=None, per_model={"weight": WEIGHTS}, out_dtype="float16", label="to float16"),
    Case("slerp", ONE, {"t": 0.3}),
    Case("nuslerp", TWO, per_model={"weight": [0.4, 0.9]}),
    Case("nuslerp", TWO, base=None, per_model={"weight": [0.4, 0.9]}, label="of models"),
    Case("nuslerp", TWO, {"nuslerp_flatten": False}, {"weight": [0.4, 0.9]}, label="by row"),
    Case("nuslerp", TWO, {"nuslerp_flatten": False}, {"weight": [0.4, 0.9]}, base=None, label="of models, by row"),
    Case(
        "nuslerp",
        TWO,
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"weight": [0.4, 0.9]},
        label="by column",
    ),
    Case("multislerp", per_model={"weight": WEIGHTS}),
    Case("multislerp", base=None, per_model={"weight": WEIGHTS}, label="of models"),
    Case("karcher"),
    Case("karcher", shared={"max_iter": 30, "tol": 1e-7}, base=None, label="of models"),
    Case("task_arithmetic", per_model={"weight": WEIGHTS}, shared={"lambda": 0.8}),
    Case("task_arithmetic", per_model={"weight": WEIGHTS}, out_dtype="float16", label="to float16"),
    Case("ties", per_model={"weight": WEIGHTS, "density": [0.5, 0.3, 0.8]}),
    Case("ties", shared={"density": 0.4, "weight": 0.5, "normalize": False, "int8_mask": True}, label="shared"),
    Case("breadcrumbs", per_model={"weight": WEIGHTS}, shared={"density": 0.6, "gamma": 0.05}),
    Case("breadcrumbs_ties", per_model={"weight": WEIGHTS}, shared={"density": 0.6, "gamma": 0.05}),
    Case("sce"),
    Case("sce", shared={"select_topk": 0.25}, label="of a quarter", is_peer_near=False),
    Case("model_stock"),
    Case("model_stock", shared={"filter_wise": True}, label="by row"),
    Case("nearswap", ONE, {"t": 1e-3}),
    Case("arcee_fusion", ONE, is_peer_near=False),
    Case("ram", shared={"epsilon": 5e-4}),
    Case("ramplus_tl", shared={"epsilon": 1.5e-3, "r": 0.3, "alpha": 0.6}),
    Case("passthrough", ONE, base=None, per_model={"scale": [0.7]}),
    Case(
        "slerp",
        ONE,
        {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7]},
                {"value": 0.25},
            ]
        },
        label="with gradients and filters",
        resolve=lambda tensor: {
            "t": gradient([0, 0.5, 0.3, 0.7, 1], tensor)
            if "self_attn" in tensor
            else gradient([1, 0.5, 0.7], tensor)
            if "mlp" in tensor
            else 0.25
        },
    ),
    Case(
        "ties",
        TWO,
        {"density": [{"filter": "mlp", "value": 0.3}, {"filter": "*", "value": 0.6}], "weight": 0.4},
        {"weight": [[0.2, 0.8], {"filter": "embed_tokens", "value": 0.9}]},
        label="with gradients and filters of each model",
        resolve=lambda tensor: {
            "density": 0.3 if "mlp" in tensor else 0.6,
            # Where no filter of the model matches, what all models share counts.
            "weight": [gradient([0.2, 0.8], tensor), 0.9 if "embed_tokens" in tensor else 0.4],
        },
    ),
]
SLICES = [
    Slices("passthrough of slices", _stacked_recipe, _stacked),
    Slices("task_arithmetic of slices", _shifted_recipe, _shifted),
]
RANDOM_CASES = [
    Case("dare_linear", per_model={"weight": WEIGHTS}, shared={"density": 0.5}),
    Case("dare_ties", per_model={"weight": WEIGHTS}, shared={"density": 0.6, "normalize": True}),
    Case("della_linear", per_model={"weight": WEIGHTS}, shared={"density": 0.5, "epsilon": 0.2}),
    Case("della", per_model={"weight": WEIGHTS}, shared={"density": 0.5, "lambda": 0.9}),
]
