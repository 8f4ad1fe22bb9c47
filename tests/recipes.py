"""Recipes and checkpoints' headers for tests: nothing is on disk but the recipe and empty folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metagpt_fast.checkpoint import Checkpoint, TensorSource
from metagpt_fast.dtypes import BF16
from metagpt_fast.methods import Method
from metagpt_fast.methods.parameters import parameter
from metagpt_fast.recipe_file import RecipeFile, load_recipe
from metagpt_fast.recipe_tensors import RecipeTensors, resolve_tensors


@dataclass(frozen=True)
class Every(Method):
    """A method with a parameter of each kind."""

    name: ClassVar[str] = "every"
    equation: ClassVar[str] = ""

    weight: tuple[float, ...] = parameter(1.0, "", per_model=True, required=True)
    density: tuple[float, ...] = parameter(1.0, "", per_model=True, minimum=0, maximum=1)
    lambda_: float = parameter(1.0, "", name="lambda")
    steps: int = parameter(3, "")
    normalize: bool = parameter(False, "")
    mode: str = parameter("a", "", choices=("a", "b", "c"))
    scale: float | None = parameter(None, "", type=float)

    def solve(self, gram, has_base):
        raise AssertionError("recipes are read and resolved here, nothing is merged")


def method_with(base: str, **attributes: object) -> type[Method]:
    """Return ``Every`` with another use of the base."""
    return type("Other", (Every,), {"base": base, **attributes})


def llama_names(num_layers: int, *, has_head: bool = True) -> list[str]:
    """Return the names of a small Llama, in the order of a file: sorted."""
    names = ["model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] if has_head else [])]
    for layer in range(num_layers):
        names += [f"model.layers.{layer}.{rest}.weight" for rest in ("self_attn.q_proj", "mlp.up_proj", "norm")]
    return sorted(names)


def checkpoint(label: str, names: Iterable[str]) -> Checkpoint:
    """Return a checkpoint of tensors that are nowhere."""
    path = Path(label)
    tensors = {name: TensorSource(name, BF16, (4,), path / "model.safetensors", 8 * i) for i, name in enumerate(names)}
    return Checkpoint(path, label, (), tensors, False, {})


def write_recipe(folder: Path, text: str, models: Iterable[str] = ("base", "a", "b", "c")) -> Path:
    """Write a recipe, and an empty folder for each model, into ``folder``."""
    for model in models:
        (folder / model).mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> RecipeFile:
    """Return a recipe of this text; the current folder has to be ``folder``."""
    return load_recipe(write_recipe(folder, text).name)


def resolve(
    folder: Path, text: str, names: Mapping[str, Iterable[str]] | Iterable[str], method: type[Method] = Every
) -> RecipeTensors:
    """Return what a recipe makes of models with these names, the same for all or by model."""
    recipe = load(folder, text)
    by_model = names if isinstance(names, Mapping) else {str(path): list(names) for path in recipe.models}
    checkpoints = [checkpoint(str(path), by_model[str(path)]) for path in recipe.models]
    return resolve_tensors(recipe, method, checkpoints)
