"""Configurations that mergekit runs, and what is special about comparing ours with its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def models(*names: str, family: str = "llama", **parameters: Any) -> list[dict[str, Any]]:
    """Return a ``models:`` list; a parameter is one value for all, or a tuple of one per model."""
    listed = []
    for i, name in enumerate(names):
        own = {key: value[i] if isinstance(value, tuple) else value for key, value in parameters.items()}
        listed.append({"model": f"{family}/{name}", **({"parameters": own} if own else {})})
    return listed


@dataclass(frozen=True)
class Recipe:
    """One configuration.

    Attributes:
        name: the test's id.
        config: mergekit's, with models as FAMILY/NAME.
        options: mergekit's options that are not the default.
        is_for_run: whether ``metagpt-fast run`` takes it, too, and means the same.
        is_random: whether masks are drawn, so that only their distribution is comparable.
        share_apart: how many elements may differ by more than rounding: thresholds at which magnitudes tie.
        by_mergekit: names of tensors that mergekit has to compute.
    """

    name: str
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    is_for_run: bool = True
    is_random: bool = False
    share_apart: float = 0.0
    by_mergekit: tuple[str, ...] = ()


def _of_method(
    method: str, listed: list[dict[str, Any]], base: str | None = "llama/base", **more: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "models": listed}
    if base is not None:
        config["base_model"] = base
    return {**config, **({"parameters": more} if more else {})}


_WEIGHTS = (0.5, 0.3, 0.4)
_EMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")
_GRADIENT = [{"filter": "self_attn", "value": [0.1, 0.6, 0.9]}, {"filter": "mlp", "value": [0.9, 0.2]}, {"value": 0.5}]

RECIPES = (
    Recipe("linear", _of_method("linear", models("a", "b", "c", weight=_WEIGHTS), None)),
    Recipe("linear-not-normalized", _of_method("linear", models("a", "b", weight=(0.7, 0.6)), None, normalize=False)),
    Recipe("task_arithmetic", _of_method("task_arithmetic", models("a", "b", "c", weight=_WEIGHTS), **{"lambda": 0.8})),
    Recipe("slerp", _of_method("slerp", models("a"), t=0.3)),
    Recipe("nuslerp", _of_method("nuslerp", models("a", "b", weight=(0.4, 0.6)), None)),
    Recipe(
        "nuslerp-task-vectors-by-row", _of_method("nuslerp", models("a", "b", weight=(0.4, 0.6)), nuslerp_flatten=False)
    ),
    Recipe(
        "nuslerp-by-column",
        _of_method("nuslerp", models("a", "b", weight=(0.4, 0.6)), None, nuslerp_flatten=False, nuslerp_row_wise=True),
    ),
    Recipe("multislerp", _of_method("multislerp", models("a", "b", "c", weight=_WEIGHTS), None)),
    Recipe("karcher", _of_method("karcher", models("a", "b", "c"), None)),
    Recipe("model_stock", _of_method("model_stock", models("a", "b", "c"))),
    Recipe("model_stock-by-row", _of_method("model_stock", models("a", "b"), filter_wise=True)),
    Recipe(
        "ties",
        _of_method(
            "ties", models("a", "b", "c", weight=_WEIGHTS, density=(0.5, 0.6, 0.7), family="llama32"), "llama32/base"
        ),
    ),
    Recipe(
        "breadcrumbs",
        _of_method(
            "breadcrumbs", models("a", "b", weight=0.5, density=0.7, family="llama32", gamma=0.05), "llama32/base"
        ),
    ),
    Recipe(
        "breadcrumbs_ties",
        _of_method(
            "breadcrumbs_ties", models("a", "b", weight=0.5, density=0.7, family="llama32", gamma=0.05), "llama32/base"
        ),
    ),
    Recipe("sce", _of_method("sce", models("a", "b", "c", family="llama32"), "llama32/base", select_topk=0.6)),
    Recipe("nearswap", _of_method("nearswap", models("a"), t=0.001)),
    Recipe("arcee_fusion", _of_method("arcee_fusion", models("a")), share_apart=0.1),
    Recipe("ram", _of_method("ram", models("a", "b", "c"), epsilon=1e-3)),
    Recipe("ramplus_tl", _of_method("ramplus_tl", models("a", "b", "c"), epsilon=1e-3)),
    Recipe("dare_linear", _of_method("dare_linear", models("a", "b", weight=0.5, density=0.6)), is_random=True),
    Recipe("dare_ties", _of_method("dare_ties", models("a", "b", weight=0.5, density=0.6)), is_random=True),
    Recipe("della", _of_method("della", models("a", "b", weight=0.5, density=0.6, epsilon=0.1)), is_random=True),
    Recipe("della_linear", _of_method("della_linear", models("a", "b", weight=0.5, density=0.6)), is_random=True),
    Recipe(
        "passthrough-slices",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "llama/a", "layer_range": [0, 2]}]},
                {"sources": [{"model": "llama/b", "layer_range": [1, 3], "parameters": {"scale": [0.5, 1.5]}}]},
            ],
        },
    ),
    Recipe(
        "slices-of-different-layers",
        {
            "merge_method": "task_arithmetic",
            "base_model": "llama/base",
            "dtype": "float32",
            "slices": [
                {
                    "sources": [
                        {"model": "llama/base", "layer_range": [first, first + 2]},
                        {"model": "llama/a", "layer_range": [first, first + 2], "parameters": {"weight": [0.2, 0.8]}},
                        {"model": "llama/b", "layer_range": [0, 2], "parameters": {"weight": 0.4}},
                    ],
                }
                for first in (0, 1)
            ],
        },
    ),
    Recipe("gradients-and-filters", _of_method("slerp", models("a"), t=_GRADIENT)),
    Recipe("out_dtype", {**_of_method("task_arithmetic", models("a", "b", weight=0.5)), "out_dtype": "bfloat16"}),
    Recipe("base-listed-and-weighted", _of_method("linear", models("base", "a", weight=(0.2, 0.8)))),
    Recipe(
        "gpt2",
        _of_method("ties", models("a", "b", family="gpt2", weight=0.5, density=1.0), "gpt2/base", normalize=False),
    ),
    Recipe("tied-embeddings", _of_method("task_arithmetic", models("a", "b", family="tied", weight=0.5), "tied/base")),
    Recipe(
        "modules",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "modules": {"default": {"models": models("a", "b", weight=(0.3, 0.7))}},
        },
        is_for_run=False,
    ),
    Recipe(
        "multimodal",
        _of_method("task_arithmetic", models("a", "b", family="vision", weight=0.5), "vision/base"),
        is_for_run=False,
    ),
    Recipe(
        "multimodal-renamed",
        _of_method("task_arithmetic", models("a", "b", family="llava", weight=0.5), "llava/base"),
        is_for_run=False,
    ),
    Recipe(
        "lora",
        _of_method(
            "task_arithmetic",
            [{"model": "llama/base+adapter", "parameters": {"weight": 0.5}}, *models("a", weight=0.3)],
        ),
        is_for_run=False,
    ),
    Recipe(
        "same-tokenizers",
        {
            **_of_method("linear", models("a", "b", weight=0.5)),
            "base_model": "llama/base",
            "tokenizer_source": "base",
            "parameters": {"weight": 0.2},
        },
        is_for_run=False,
    ),
    Recipe(
        "union-tokenizer",
        {
            **_of_method("linear", [*models("a", weight=0.5), *models("a", family="larger", weight=0.5)], None),
            "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
        },
        is_for_run=False,
        by_mergekit=_EMBEDDINGS,
    ),
    Recipe(
        "other-tokenizer",
        {
            **_of_method("slerp", models("a", family="larger"), "llama/base", t=0.5),
            "tokenizer_source": "llama/base",
            "chat_template": "chatml",
        },
        is_for_run=False,
        by_mergekit=_EMBEDDINGS,
    ),
    Recipe(
        "truncated-embeddings",
        _of_method("linear", [*models("a", weight=0.5), *models("a", family="larger", weight=0.5)], None),
        {"unsafe_truncate_embeddings": True},
        is_for_run=False,
    ),
)

TIES = {
    "merge_method": "ties",
    "base_model": "llama/base",
    "dtype": "float32",
    "out_dtype": "bfloat16",
    "models": models("a", "b", "c"),
    "parameters": {"density": 0.6},
}
LINEAR = {"merge_method": "linear", "models": models("a", "b", weight=0.5)}
