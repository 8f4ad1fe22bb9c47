"""What a merge will do, from headers alone: layers, order, counts, and hints that work when they are followed."""

from __future__ import annotations

import json
import re
import shlex

import pytest

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, DTYPES, F32
from metagpt_fast.plan import layer_of

from .checkpoints import Tensor, integers, random_states, tensor, three_models, write_family, write_state


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "model.layers.3"),
        ("down_blocks.0.attentions.1.norm.weight", "down_blocks.0"),
        ("0.weight", "0"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.5", "model.layers.5"),
        ("conv1d.weight", "conv1d.weight"),
        ("", ""),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


STATE = {
    "layers.1.b": tensor([1.0, 2.0]),
    "head": tensor([[1.0, 2.0, 3.0]], F32),
    "layers.0.a": tensor([1.0]),
    "layers.1.a": tensor([[0.5]]),
    "ids": integers([1, 2]),
    "layers.0.b": tensor([4.0]),
}


@pytest.fixture
def family(tmp_path):
    changed = {
        name: each if name == "ids" else tensor(each.values + 1, BF16, each.shape) for name, each in STATE.items()
    }
    return write_family(tmp_path / "in", [STATE, changed, dict(sorted(changed.items()))])


def test_tensors_are_ordered_by_layer_in_the_order_of_the_base(family):
    plan = mf.plan_merge(family[0], family[1])
    names = ["layers.1.b", "layers.1.a", "head", "layers.0.a", "layers.0.b", "ids"]
    assert [each.name for each in plan.tensors] == names
    assert [each.name for each in plan.merged] == names[:-1]
    assert [each.name for each in plan.copied] == ["ids"]
    assert [each.models[1].name for each in plan.merged] == names[:-1]


@pytest.mark.parametrize(
    ("granularity", "scopes"),
    [
        ("model", {"model": ["layers.1.b", "layers.1.a", "head", "layers.0.a", "layers.0.b"]}),
        (
            "layer",
            {"layers.1": ["layers.1.b", "layers.1.a"], "head": ["head"], "layers.0": ["layers.0.a", "layers.0.b"]},
        ),
        ("tensor", {name: [name] for name in ["layers.1.b", "layers.1.a", "head", "layers.0.a", "layers.0.b"]}),
    ],
)
def test_scopes(family, granularity, scopes):
    plan = mf.plan_merge(family[0], family[1], granularity=granularity)
    assert {scope.name: [each.name for each in scope.tensors] for scope in plan.scopes} == scopes


def test_counts_and_dict(family):
    plan = mf.plan_merge(family[0], family[1], exclude="layers.0", dtype="f32")
    assert plan.num_parameters == 10
    numel = 2 + 1 + 3
    base_nbytes, model_nbytes = 2 * 3 + 4 * 3, 2 * numel
    copied_nbytes = 2 + 2 + 16
    assert plan.nbytes_measured == base_nbytes + 2 * model_nbytes
    assert plan.nbytes_combined == plan.nbytes_measured + copied_nbytes
    assert plan.nbytes_written == 4 * numel + copied_nbytes
    linear = mf.plan_merge(family[0], family[1], exclude="layers.0", method="linear")
    assert linear.nbytes_combined == 2 * model_nbytes + copied_nbytes
    written = plan.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert (written["num_tensors"], written["num_copied"], written["num_scopes"]) == (6, 3, 1)
    assert written["nbytes_measured"] == plan.nbytes_measured
    assert linear.to_dict()["nbytes_measured"] == 0
    assert written["tensors"][2] == {
        "name": "head",
        "layer": "head",
        "shape": [1, 3],
        "action": "merge",
        "base_dtype": "F32",
        "model_dtypes": ["BF16", "BF16"],
        "out_dtype": "F32",
        "sources": [{"path": str(source.path), "name": "head"} for source in plan.tensors[2].sources],
        "models": ["m0", "m1"],
        "parameters": {"exponent": 2.0},
    }


def test_excluded_tensors_may_be_anything_in_the_models(tmp_path):
    states = random_states(31, [(BF16,)] * 3, {"a": (4,), "head": (3, 2), "tail": (5,)})
    states[1]["head"] = integers([1, 2, 3])
    del states[1]["tail"]
    states[2]["head.extra"] = tensor([1.0])
    base, models = write_family(tmp_path / "in", states)
    plan = mf.plan_merge(base, models, exclude="^head|tail")
    assert [each.name for each in plan.merged] == ["a"]
    assert [each.name for each in plan.tensors] == ["a", "head", "tail"]


AWKWARD_NAMES = ["plain.weight", "größe + (a|b)[0]", "it's $HOME", "^caret$", "a\\d", "weight", "-o"]


def follow(hint):
    """Return the pattern that a shell would pass on from the command in a hint."""
    match = re.search(r"--exclude ('.*')(, or|; weights|$)", hint)
    [pattern] = shlex.split(match.group(1))
    return pattern


@pytest.mark.parametrize("name", AWKWARD_NAMES)
@pytest.mark.parametrize("problem", ["missing", "shape", "dtype", "fp8", "extra", "buffer"])
def test_hints_take_exactly_this_tensor_from_the_base(tmp_path, problem, name):
    states = random_states(32, [(BF16,)] * 2, {"other.weight": (4,), f"x{name}y": (3,), "plain.weight_scale": (2,)})
    for state in states:
        state[name] = tensor([0.5, 1.0])
    if problem == "missing":
        del states[1][name]
    elif problem == "extra":
        del states[0][name]
    elif problem == "buffer":
        states[0][name], states[1][name] = integers([1]), integers([2])
    elif problem == "shape":
        states[1][name] = tensor([1.0, 2.0, 3.0])
    elif problem == "dtype":
        states[1][name] = integers([1, 2])
    else:
        states[1][name] = Tensor(DTYPES["F8_E4M3"], (2,), tensor([0.5]).raw)
    base, models = write_family(tmp_path / "in", states)
    with pytest.raises(mf.PlanError) as caught:
        mf.merge(base, models, tmp_path / "out")
    report = mf.merge(base, models, tmp_path / "out", exclude=follow(caught.value.hint))
    assert report.num_copied == (problem != "extra")


@pytest.mark.parametrize(
    ("names", "is_vocabulary"),
    [
        (("model.embed_tokens.weight", "lm_head.weight"), True),
        (("transformer.wte.weight",), True),
        (("gpt_neox.embed_in.weight", "embed_out.weight"), True),
        (("model.layers.0.mlp.up_proj.weight",), False),
    ],
)
def test_different_vocabularies_are_named_and_the_hint_works(tmp_path, names, is_vocabulary):
    small, large = ({"a": (4,), **dict.fromkeys(names, (rows, 3))} for rows in (10, 12))
    base = write_state(tmp_path / "base", random_states(33, [(BF16,)], small)[0])
    model = write_state(tmp_path / "chat", random_states(34, [(BF16,)], large)[0])
    with pytest.raises(mf.PlanError) as caught:
        mf.merge(base, [model], tmp_path / "out")
    error = caught.value
    assert (error.got, error.expected) == ("[12, 3]", "[10, 3], as in the base")
    assert ("vocabularies differ" in error.what) == is_vocabulary
    assert mf.merge(base, [model], tmp_path / "out", exclude=follow(error.hint)).num_copied == len(names)


def test_a_link_to_the_base_is_the_base(tmp_path):
    base, models = three_models(tmp_path / "in", num_shards=2)
    (tmp_path / "link").symlink_to(base)
    for path in (base, str(base) + "/.", tmp_path / "link"):
        with pytest.raises(mf.PlanError, match="the base is also given as one of the models"):
            mf.plan_merge(base, [*models, path])
