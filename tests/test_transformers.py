"""transformers loads what we merge: tiny random models of several families, tied and untied embeddings."""

from __future__ import annotations

import json

import pytest

import metagpt_fast as mf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
}


def make_family(folder, config, dtype):
    """Save a base and two fine-tunes of it; return their folders and their parameters."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    folders, weights = [], []
    for name, sigma in (("base", 0.0), ("first", 2e-3), ("second", 1e-3)):
        if sigma:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * sigma)
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "first" else "1GB")
        folders.append(folder / name)
        weights.append({key: value.detach().double().clone() for key, value in model.named_parameters()})
    return folders, weights


@pytest.mark.parametrize("family", CONFIGS)
def test_the_merged_model_loads_and_generates(family, tmp_path):
    config = CONFIGS[family]()
    (base, *models), (base_weights, *model_weights) = make_family(tmp_path, config, torch.bfloat16)
    mf.merge(base, models, tmp_path / "merged", max_shard_size="30KB")

    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert merged.dtype == torch.bfloat16

    squares = [sum(float(((w[key] - base_weights[key]) ** 2).sum()) for key in base_weights) for w in model_weights]
    shares = [square / sum(squares) for square in squares]
    num_elements = num_equal = 0
    for key, value in merged.named_parameters():
        deltas = (share * (w[key] - base_weights[key]) for share, w in zip(shares, model_weights, strict=True))
        expected = (base_weights[key] + sum(deltas)).to(torch.bfloat16)
        num_elements += value.numel()
        num_equal += int((value == expected).sum())
    assert num_equal >= 0.999 * num_elements

    tokens = merged.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 3
    assert torch.isfinite(merged(tokens).logits).all()


def test_dtype_is_written_into_the_config(tmp_path):
    (base, *models), _ = make_family(tmp_path, CONFIGS["llama"](), torch.float32)
    mf.merge(base, models, tmp_path / "merged", dtype="bf16")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
