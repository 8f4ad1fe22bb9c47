"""transformers loads what we merge, and it generates: tiny random models of several architectures."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open

import metagpt_fast as mf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SIZES, tie_word_embeddings=False),
    "gpt2-tied": lambda: transformers.GPT2Config(**GPT2_SIZES),
}
TOKENIZER_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "special_tokens_map.json": "{}",
}


def make_family(folder, config, dtype):
    """Save a base and three fine-tunes of it; return their folders and their parameters."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    folders, weights = [], []
    for name, sigma in (("base", 0.0), ("chat", 2e-3), ("math", 1e-3), ("code", 1.5e-3)):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key] + torch.randn_like(parameter) * sigma)
        model.save_pretrained(folder / name, max_shard_size="20KB" if name in {"base", "math"} else "1GB")
        folders.append(folder / name)
        weights.append({key: value.detach().double().clone() for key, value in model.named_parameters()})
    for name, content in TOKENIZER_FILES.items():
        (folders[0] / name).write_text(content)
    return folders, weights


def merge_by_hand(base, models):
    """MetaGPT in float64 on parameters by name, from the paper's equations 2 and 15."""
    squares = [sum(((model[key] - base[key]) ** 2).sum() for key in base) for model in models]
    shares = [square / sum(squares) for square in squares]
    return {
        key: value + sum(share * (model[key] - value) for share, model in zip(shares, models, strict=True))
        for key, value in base.items()
    }


def check_loads(folder, expected, dtype):
    """Load a merged model; its parameters have to be the expected ones, rounded, and it has to generate."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.dtype == dtype
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    assert {value.dtype for value in parameters.values()} == {dtype}
    for key, value in parameters.items():
        # Two units: the fp32 arithmetic rounds a few times. And the least number of float16 is 6e-8.
        torch.testing.assert_close(value.double(), expected[key], rtol=2 * torch.finfo(dtype).eps, atol=6e-8)
    is_rounding = torch.cat([(value == expected[key].to(dtype)).flatten() for key, value in parameters.items()])
    assert dtype == torch.float32 or is_rounding.double().mean() > 0.999
    prompt = torch.tensor([[1, 2, 3]])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert tokens.shape == (1, 7)
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_merged_model_loads_and_generates(family, tmp_path):
    (base, *models), (base_weights, *model_weights) = make_family(tmp_path, CONFIGS[family](), torch.bfloat16)
    report = mf.merge(base, models, tmp_path / "merged", max_shard_size="30KB")
    assert report.warnings == ()
    check_loads(tmp_path / "merged", merge_by_hand(base_weights, model_weights), torch.bfloat16)

    weight_map = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == set(report.shards)
    for shard in report.shards:
        with safe_open(tmp_path / "merged" / shard, "pt") as file:
            assert set(file.keys()) == {name for name, owner in weight_map.items() if owner == shard}
            assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
    for name, content in TOKENIZER_FILES.items():
        assert (tmp_path / "merged" / name).read_text() == content
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads((base / name).read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_the_output_is_that_of_the_loaded_model(dtype, tmp_path):
    (base, *models), (base_weights, *model_weights) = make_family(tmp_path, CONFIGS["llama"](), torch.float32)
    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "keep"}[dtype]
    mf.merge(base, models, tmp_path / "merged", dtype=name)
    check_loads(tmp_path / "merged", merge_by_hand(base_weights, model_weights), dtype)


def test_another_vocabulary_with_the_tensors_excluded(tmp_path):
    (base, *models), _ = make_family(tmp_path, CONFIGS["llama"](), torch.bfloat16)
    larger = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    larger.resize_token_embeddings(70, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(mf.PlanError, match="the vocabularies differ"):
        mf.merge(base, [tmp_path / "larger", models[1]], tmp_path / "merged")
    report = mf.merge(base, [tmp_path / "larger", models[1]], tmp_path / "merged", exclude="embed_tokens|lm_head")
    assert report.num_copied == 2
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.get_input_embeddings().weight, base_model.get_input_embeddings().weight)


def test_the_state_dict_of_a_model_is_merged_in_place(tmp_path):
    (base, *models), (base_weights, *model_weights) = make_family(tmp_path, CONFIGS["qwen2"](), torch.bfloat16)
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (base, *models)]
    first = loaded[0].state_dict()
    mf.merge_state_dicts(first, [model.state_dict() for model in loaded[1:]], out=first)
    loaded[0].save_pretrained(tmp_path / "merged")
    check_loads(tmp_path / "merged", merge_by_hand(base_weights, model_weights), torch.bfloat16)
