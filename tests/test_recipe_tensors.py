"""From a recipe to the tensors of the output: slices, bases, what is refused, and that nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import F32
from metagpt_fast.errors import PlanError, RecipeError
from metagpt_fast.layer_names import LayerName, is_before_layers, split_name
from metagpt_fast.methods import METHODS
from metagpt_fast.plan import layer_of
from metagpt_fast.recipe_methods import MethodMaker, find_recipe_method
from metagpt_fast.recipe_tensors import LayerOrigin, resolve_tensors

from .checkpoints import random_states, write_family
from .recipes import Every, llama_names, load, method_with, resolve

HEAD = "merge_method: every\nbase_model: base\nparameters: {weight: 1}\n"
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
NAMES = llama_names(4)
IGNORED = method_with("ignored")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(*arguments, kind=RecipeError):
    with pytest.raises(kind) as caught:
        resolve(*arguments)
    return caught.value


def slices(*sources):
    """Return slices of one source each, from pairs of a model and a range."""
    lines = [f"- sources: [{{model: {model}, layer_range: [{first}, {end}]}}]\n" for model, first, end in sources]
    return "slices:\n" + "".join(lines)


def inputs(tensor):
    return [(each.model, each.source.name) for each in tensor.inputs]


# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers.", 12, ".self_attn.q_proj.weight")),
        ("h.0.attn.bias", ("h.", 0, ".attn.bias")),
        ("0.weight", ("", 0, ".weight")),
        ("layers.3.experts.7.up", ("layers.", 3, ".experts.7.up")),
        ("layers.007.up", ("layers.", 7, ".up")),
        ("model.norm.weight", None),
        ("wte.weight", None),
        ("layer1.weight", None),
        ("a.1", None),
        ("a." + "9" * 5000 + ".b", None),
        ("." * 5000, None),
    ],
)
def test_layers_in_names(name, parts):
    assert split_name(name) == (None if parts is None else LayerName(*parts))
    if parts is not None:
        assert layer_of(name) == name.removesuffix(parts[2])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wpe.weight",
        "gpt_neox.embed_in.weight",
        "transformer.word_embeddings.weight",
        "transformer.word_embeddings_layernorm.bias",
        "bert.embeddings.LayerNorm.weight",
        "model.tok_embeddings.weight",
        "model.embedding_norm.weight",
        "model.language_model.embed_tokens.weight",
        "transformer.embd.wte.weight",
        "transformer.rotary_pos_emb.inv_freq",
        "shared.weight",
        "embed_tokens.weight",
    ],
)
def test_what_is_before_the_layers(name):
    assert is_before_layers(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "lm_head.embeddings.bias",
        "embed_out.weight",
        "output.weight",
        "transformer.ln_f.bias",
        "ln_f.weight",
        "gpt_neox.final_layer_norm.bias",
        "score.weight",
        "bert.pooler.dense.weight",
        "cls.predictions.bias",
        "model.member.weight",
    ],
)
def test_what_is_after_the_layers(name):
    assert not is_before_layers(name)


# Whole models


def test_whole_models_keep_their_names_and_order(tmp_path):
    names = ["z", *NAMES, "model.layers.1.extra", "a"]
    resolved = resolve(tmp_path, HEAD + "models: [{model: a}, {model: b}]", names)
    assert [tensor.name for tensor in resolved.tensors] == names
    assert all(inputs(tensor) == [(i, tensor.name) for i in range(3)] for tensor in resolved.tensors)
    assert (resolved.layers, resolved.num_layers, resolved.warnings) == ((), None, ())


def test_the_order_is_the_bases(tmp_path):
    names = {"base": NAMES, "a": NAMES[::-1]}
    assert [t.name for t in resolve(tmp_path, HEAD + "models: [{model: a}]", names).tensors] == NAMES


def test_each_stack_of_layers_has_its_own_gradient(tmp_path):
    names = [f"encoder.block.{i}.w" for i in range(3)] + [f"decoder.block.{i}.w" for i in range(5)] + ["blocks.0.w"]
    resolved = resolve(tmp_path, HEAD + "models: [{model: a}]", names)
    assert [tensor.t for tensor in resolved.tensors] == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("use", "models", "listed", "base"),
    [
        ("required", ["a", "b", "base"], "ab", 2),
        ("required", ["a", "base", "b"], ["a", "base", "b"], 1),
        ("optional", ["a", "b", "base"], "ab", 2),
        ("model", ["a", "b", "base"], "ab", 2),
        ("ignored", ["a", "b"], "ab", None),
        ("ignored", ["base", "b"], ["base", "b"], None),
    ],
)
def test_the_base(tmp_path, use, models, listed, base):
    text = "models: [" + ", ".join(f"{{model: {name}}}" for name in listed) + "]"
    recipe = load(tmp_path, HEAD + text)
    resolved = resolve(tmp_path, HEAD + text, NAMES, method_with(use))
    for tensor in resolved.tensors:
        assert [str(recipe.models[each.model]) for each in tensor.inputs] == models
        assert tensor.base == base
    # That a base is left out of an average may be a surprise.
    assert len(resolved.warnings) == (use == "ignored" and "base" not in listed)


def test_a_base_is_optional_for_methods_that_say_so(tmp_path):
    for use in ("optional", "model", "ignored"):
        resolved = resolve(tmp_path, LINEAR + "models: [{model: a}]", NAMES, method_with(use))
        assert resolved.tensors[0].base is None
    error = refusal(tmp_path, LINEAR + "models: [{model: a}]", NAMES, Every)
    assert error.where == "recipe.yaml:1"
    assert "every needs a base_model" in error.what


def test_a_base_that_is_ignored_may_have_other_tensors(tmp_path):
    resolved = resolve(tmp_path, HEAD + "models: [{model: a}]", {"a": NAMES, "base": ["x"]}, IGNORED)
    assert len(resolved.tensors) == len(NAMES)


@pytest.mark.parametrize(
    ("models", "where", "says"),
    [
        (
            {"base": NAMES, "a": NAMES, "b": NAMES[1:]},
            "b",
            ["'lm_head.weight' is missing from b", "base has", "tie_word"],
        ),
        ({"base": NAMES, "a": NAMES, "b": [*NAMES, "more"]}, "b", ["'more' of b would be lost"]),
        ({"base": NAMES[:-1], "a": NAMES, "b": NAMES}, "a", [f"{NAMES[-1]!r} of a would be lost"]),
        ({"base": NAMES, "a": llama_names(3), "b": NAMES}, "a", ["'model.layers.3.", "is missing from a"]),
    ],
)
def test_every_model_has_every_tensor(tmp_path, models, where, says):
    error = refusal(tmp_path, HEAD + "models: [{model: a}, {model: b}]", models, kind=PlanError)
    assert error.where == where
    for part in says:
        assert part in str(error)


# Slices


def test_slices_renumber_layers(tmp_path):
    text = LINEAR + slices(("a", 0, 3), ("b", 1, 3), ("a", 3, 4))
    resolved = resolve(tmp_path, text, NAMES, IGNORED)
    made = {tensor.name: inputs(tensor) for tensor in resolved.tensors}
    assert len(made) == len(resolved.tensors) == 6 * 3 + 3
    origins = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (0, 3)]
    assert resolved.layers == tuple(LayerOrigin(*origin) for origin in origins)
    assert resolved.num_layers == 6
    for layer, (model, origin) in enumerate(origins):
        for rest in ("self_attn.q_proj", "mlp.up_proj", "norm"):
            assert made[f"model.layers.{layer}.{rest}.weight"] == [(model, f"model.layers.{origin}.{rest}.weight")]
    assert [tensor.t for tensor in resolved.tensors if ".norm.weight" in tensor.name and "layers" in tensor.name] == [
        0, 0.5, 1, 0, 1, 1,
    ]  # fmt: skip
    assert [tensor.name for tensor in resolved.tensors][:1] == ["model.embed_tokens.weight"]
    assert [tensor.name for tensor in resolved.tensors][-2:] == ["lm_head.weight", "model.norm.weight"]


def test_what_is_outside_comes_from_the_first_and_the_last_slice(tmp_path):
    text = (
        "merge_method: linear\n"
        + """slices:
- sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]
  parameters: {lambda: 10}
- sources: [{model: b, layer_range: [0, 1], parameters: {weight: 2}}]
  parameters: {lambda: 20}
- sources:
  - {model: b, layer_range: [0, 1], parameters: {weight: 3}}
  - {model: c, layer_range: [1, 2], parameters: {weight: [4, 5]}}
  parameters: {lambda: 30}
"""
    )
    resolved = resolve(tmp_path, text, NAMES, IGNORED)
    found = {
        tensor.name: ([(each.model, each.parameters["weight"]) for each in tensor.inputs], tensor.parameters["lambda"])
        for tensor in resolved.tensors
    }
    assert found["model.embed_tokens.weight"] == ([(0, 1)], 10)
    assert found["model.layers.1.norm.weight"] == ([(1, 2)], 20)
    assert found["model.layers.2.norm.weight"] == ([(1, 3), (2, 5)], 30)
    # More sources than the first slice has: mergekit counts those, and loses c here.
    assert found["lm_head.weight"] == found["model.norm.weight"] == ([(1, 3), (2, 4)], 30)


def test_gpt2_and_bare_names(tmp_path):
    for prefix in ("transformer.", ""):
        outside = [f"{prefix}{name}" for name in ("ln_f.bias", "ln_f.weight", "wpe.weight", "wte.weight")]
        names = [*outside, *(f"{prefix}h.{i}.attn.c_attn.weight" for i in range(4))]
        resolved = resolve(tmp_path, LINEAR + slices(("a", 0, 2), ("b", 2, 4)), names, IGNORED)
        models = {tensor.name: tensor.inputs[0].model for tensor in resolved.tensors}
        assert [models[name] for name in outside] == [1, 1, 0, 0]
        assert models[f"{prefix}h.1.attn.c_attn.weight"] == 0
        assert models[f"{prefix}h.3.attn.c_attn.weight"] == 1


def test_sources_of_one_slice_are_merged_with_the_base_of_the_slice(tmp_path):
    text = (
        HEAD
        + """slices:
- base_model: b
  sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
- sources: [{model: base, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]
"""
    )
    resolved = resolve(tmp_path, text, NAMES)
    by_name = {tensor.name: tensor for tensor in resolved.tensors}
    assert by_name["model.layers.0.norm.weight"].base == 1
    assert inputs(by_name["model.layers.0.norm.weight"])[1] == (1, "model.layers.1.norm.weight")
    assert by_name["model.layers.3.norm.weight"].base == 0
    assert (by_name["model.embed_tokens.weight"].base, by_name["lm_head.weight"].base) == (1, 0)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (slices(("a", 0, 2), ("a", 3, 5)), 5, ["got [3, 5]", "layers from 0 to 4, the number of layers of a"]),
        (slices(*[("a", 0, 4)] * 2501), 3, ["too many layers", "got 10004"]),
        (slices(("a", 0, 10**30)), 4, ["number of layers of a"]),
    ],
)
def test_layers_that_are_not_there(tmp_path, text, line, says):
    error = refusal(tmp_path, LINEAR + text, NAMES, IGNORED)
    assert error.where == f"recipe.yaml:{line}"
    for part in says:
        assert part in str(error)


def test_the_base_has_to_be_among_the_sources(tmp_path):
    for use in ("required", "optional", "model"):
        error = refusal(tmp_path, HEAD + slices(("a", 0, 2)), NAMES, method_with(use))
        assert error.where == "recipe.yaml:5"
        assert "base with its layer_range" in error.expected
    assert resolve(tmp_path, HEAD + slices(("a", 0, 2)), NAMES, IGNORED).warnings == ()


def bare(names, old="model.layers.", new="layers."):
    return [name.replace(old, new) for name in names]


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"a": ["x"], "b": ["x"]}, ["one stack", "no layers"]),
        ({"a": NAMES, "b": bare(NAMES)}, ["one stack", "'model.layers.' in a", "'layers.' in b", "models:"]),
        ({"a": NAMES, "b": [*NAMES, "visual.blocks.0.w"]}, ["one stack", "'visual.blocks.' in b"]),
        ({"a": NAMES, "b": [n for n in NAMES if ".1." not in n]}, ["has no layer 1, but a layer 3", "recipe.yaml:5"]),
        ({"a": NAMES, "b": [*NAMES, "model.layers.01.norm.weight"]}, ["are of one layer"]),
        ({"a": NAMES, "b": NAMES[1:]}, ["'lm_head.weight' of a would be lost", "last slice", "after"]),
        ({"a": NAMES, "b": [*NAMES, "my.embed.bias"]}, ["'my.embed.bias' of b would be lost", "first slice", "before"]),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, models, says):
    error = refusal(tmp_path, LINEAR + slices(("a", 0, 2), ("b", 0, 1)), models, IGNORED, kind=PlanError)
    for part in says:
        assert part in str(error)


@pytest.mark.parametrize("more", ["a", "b"])
def test_layers_that_are_merged_have_the_same_tensors(tmp_path, more):
    text = LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]}]"
    layer = 1 if more == "a" else 2
    models = {name: [*NAMES, *([f"model.layers.{layer}.bias"] if name == more else [])] for name in "ab"}
    error = refusal(tmp_path, text, models, IGNORED, kind=PlanError)
    assert (
        f"'model.layers.{layer}.bias' has no counterpart in layer {3 - layer} of {'ba'['ab'.index(more)]}" in error.what
    )
    assert error.where == more


def test_dropped_layers_may_have_tensors_of_their_own(tmp_path):
    names = [*NAMES, "model.layers.3.bias"]
    resolved = resolve(tmp_path, LINEAR + slices(("a", 0, 2), ("b", 1, 3)), names, IGNORED)
    assert resolved.num_layers == 4
    assert not any("bias" in tensor.name for tensor in resolved.tensors)


# Filters, methods


def test_filters_that_find_nothing_are_warned_of(tmp_path):
    text = """merge_method: linear
models:
- model: a
  parameters:
    weight:
    - {filter: self_atn, value: 1}
    - {filter: '*', value: 2}
    - {filter: mlp, value: 2}
"""
    resolved = resolve(tmp_path, text, NAMES, IGNORED)
    assert resolved.warnings == ("recipe.yaml:6: the filter 'self_atn' is in no tensor's name",)


def test_methods_of_tensors(tmp_path):
    text = """merge_method: task_arithmetic
base_model: base
models:
- {model: a, parameters: {weight: [{filter: mlp, value: 1}, {value: 2}]}}
- {model: b, parameters: {weight: 1}}
parameters: {lambda: 0.5}
"""
    recipe = load(tmp_path, text)
    cls = find_recipe_method(recipe)
    assert cls is METHODS["task_arithmetic"]
    maker = MethodMaker(recipe, cls)
    tensors = resolve(tmp_path, text, NAMES, cls).tensors
    made = {tensor.name: maker.method_of(tensor, tensor.inputs[:2]) for tensor in tensors}
    assert {method.weight for name, method in made.items() if "mlp" in name} == {(1.0,)}
    assert {method.weight for name, method in made.items() if "mlp" not in name} == {(2.0, 1.0)}
    assert {method.lambda_ for method in made.values()} == {0.5}
    assert len({id(method) for method in made.values()}) == len(maker.made) == 2


def test_an_unknown_method(tmp_path):
    with pytest.raises(RecipeError, match="unknown method") as caught:
        find_recipe_method(load(tmp_path, "merge_method: linaer\nmodels: [{model: a}]"))
    assert caught.value.where == "recipe.yaml:1"
    assert caught.value.hint == "did you mean linear?"


def test_computed_weights_of_several_models(tmp_path):
    """Defaults of each model are one default, which MetaGPT's coefficients may replace."""
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\ncoefficients: metagpt\n"
    recipe = load(tmp_path, text)
    tensor = resolve(tmp_path, text, NAMES, METHODS["ties"]).tensors[0]
    method = MethodMaker(recipe, METHODS["ties"]).method_of(tensor, tensor.inputs[:2])
    assert method.parameters()["coefficients"] == "metagpt"


def test_a_number_of_models_that_the_method_does_not_take(tmp_path):
    text = "merge_method: nearswap\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {t: 1}"
    recipe = load(tmp_path, text)
    tensor = resolve(tmp_path, text, NAMES, METHODS["nearswap"]).tensors[0]
    with pytest.raises(RecipeError, match="number of models") as caught:
        MethodMaker(recipe, METHODS["nearswap"]).method_of(tensor, tensor.inputs[:2])
    assert caught.value.where.startswith("recipe.yaml:1, tensor")


@dataclass(frozen=True)
class Pair(Every):
    name = "pair"
    base = "ignored"

    def __post_init__(self):
        super().__post_init__()
        if self.steps == 2 and self.normalize:
            raise RecipeError("steps and normalize", where="pair.steps", got=2)


def test_values_that_do_not_go_together_name_the_tensor(tmp_path):
    text = LINEAR.replace("weight: 1", "weight: 1, normalize: yes, steps: 2") + "models: [{model: a}]"
    recipe = load(tmp_path, text)
    tensor = resolve(tmp_path, text, NAMES, Pair).tensors[0]
    with pytest.raises(RecipeError) as caught:
        MethodMaker(recipe, Pair).method_of(tensor, tensor.inputs)
    assert caught.value.where == "recipe.yaml:1, tensor 'lm_head.weight': pair.steps"


def test_real_checkpoints(tmp_path):
    shapes = {"embed.weight": (4, 3), "layers.0.w": (3, 3), "layers.1.w": (3, 3), "norm.weight": (3,)}
    write_family(tmp_path / "family", random_states(1, [(F32,)] * 2, shapes))
    recipe = load(tmp_path, LINEAR + slices(("family/base", 0, 2), ("family/m0", 0, 2)))
    resolved = resolve_tensors(recipe, IGNORED, [open_checkpoint(path) for path in recipe.models])
    assert [tensor.name for tensor in resolved.tensors] == [
        "embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "layers.3.w", "norm.weight",
    ]  # fmt: skip
    assert [tensor.inputs[0].source.path.parent.name for tensor in resolved.tensors] == ["base"] * 3 + ["m0"] * 3
