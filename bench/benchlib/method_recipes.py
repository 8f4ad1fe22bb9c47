"""A recipe for every merge method that mergekit has too, with parameters that people use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from make_family import BenchFamily


@dataclass(frozen=True)
class MethodRecipe:
    """A method and its parameters.

    Attributes:
        num_models: of the fine-tunes that are merged.
        shared: parameters of the merge, as YAML.
        weight: parameter of each model; None: the method has none.
        has_base: whether the base is named.
        is_slow: whether mergekit takes minutes.
    """

    num_models: int = 3
    shared: Mapping[str, str] = field(default_factory=dict)
    weight: str | None = None
    has_base: bool = True
    is_slow: bool = False

    def text(self, method: str, family: BenchFamily, dtype: str) -> str:
        """Return the YAML; ``dtype`` is that of the arithmetic, the output is bfloat16."""
        lines = [
            f"merge_method: {method}",
            f"dtype: {dtype}",
            *(["out_dtype: bfloat16"] if dtype != "bfloat16" else []),
        ]
        if self.has_base:
            lines.append(f"base_model: {_quoted(family.base)}")
        lines.append("models:")
        for model in family.models[: self.num_models]:
            lines.append(f"  - model: {_quoted(model)}")
            if self.weight is not None:
                lines += ["    parameters:", f"      weight: {self.weight}"]
        if self.shared:
            lines += ["parameters:", *(f"  {name}: {value}" for name, value in self.shared.items())]
        return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


METHOD_RECIPES: dict[str, MethodRecipe] = {
    "passthrough": MethodRecipe(1, has_base=False),
    "linear": MethodRecipe(weight="1.0", has_base=False),
    "task_arithmetic": MethodRecipe(weight="0.3"),
    "slerp": MethodRecipe(1, {"t": "0.5"}),
    "nuslerp": MethodRecipe(2, weight="0.5"),
    "multislerp": MethodRecipe(weight="0.5"),
    "karcher": MethodRecipe(),
    "model_stock": MethodRecipe(),
    "nearswap": MethodRecipe(1, {"t": "0.001"}),
    "arcee_fusion": MethodRecipe(1),
    "ram": MethodRecipe(),
    "ramplus_tl": MethodRecipe(),
    "dare_linear": MethodRecipe(3, {"density": "0.5"}, "0.3", is_slow=True),
    "dare_ties": MethodRecipe(3, {"density": "0.5"}, "0.3", is_slow=True),
    "della_linear": MethodRecipe(3, {"density": "0.5", "epsilon": "0.15"}, "0.3", is_slow=True),
    "della": MethodRecipe(3, {"density": "0.5", "epsilon": "0.15"}, "0.3", is_slow=True),
    "breadcrumbs": MethodRecipe(3, {"density": "0.5", "gamma": "0.01"}, "0.3", is_slow=True),
    "breadcrumbs_ties": MethodRecipe(3, {"density": "0.5", "gamma": "0.01"}, "0.3", is_slow=True),
    "ties": MethodRecipe(3, {"density": "0.5"}, "0.5", is_slow=True),
    "sce": MethodRecipe(3, {"select_topk": "0.5"}, is_slow=True),
}
