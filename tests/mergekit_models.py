"""Tiny models with random weights, as transformers saves them, for tests of the mergekit integration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NUM_LAYERS = 3
SIGMA = {"base": 0.0, "a": 4e-3, "b": 2e-3, "c": 3e-3}
WORDS = [f"w{i}" for i in range(60)]


def make_zoo(folder: Path) -> None:
    """Write every model of the tests into ``folder``: ``llama/base``, ``llama/a`` ..., and so on."""
    import transformers as tf

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = tf.LlamaConfig(**text, **heads, max_position_embeddings=64, tie_word_embeddings=False)
    _family(folder / "llama", llama, WORDS, num_shards=2)
    # In float32 hardly two magnitudes are equal, so that thresholds part elements in one way only.
    _family(folder / "llama32", llama, (), is_float32=True)
    tied = tf.LlamaConfig(**text, **heads, max_position_embeddings=64, tie_word_embeddings=True)
    _family(folder / "tied", tied, WORDS)
    gpt2 = tf.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=NUM_LAYERS, n_positions=32)
    _family(folder / "gpt2", gpt2, WORDS)
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    multimodal = tf.Qwen2_5_VLConfig(text_config={**text, **heads, "rope_scaling": rope}, vision_config=vision)
    _family(folder / "vision", multimodal, ())
    clip = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, image_size=8, patch_size=4
    )
    renamed = tf.LlavaConfig(vision_config=clip, text_config=tf.LlamaConfig(**text, **heads), image_token_index=63)
    _family(folder / "llava", renamed, ())
    # Other vocabularies: more tokens, in another order.
    larger = tf.LlamaConfig(**{**text, "vocab_size": 72}, **heads, tie_word_embeddings=False)
    _family(folder / "larger", larger, [*reversed(WORDS), *(f"new{i}" for i in range(8))], names=("a", "b"))
    _adapter(folder)


def _family(
    folder: Path,
    config: Any,
    words: Iterable[str],
    *,
    names: Iterable[str] = tuple(SIGMA),
    num_shards: int = 1,
    is_float32: bool = False,
) -> None:
    """Write a base and its fine-tunes, in bfloat16 or float32."""
    import torch
    import transformers as tf

    torch.manual_seed(len(str(folder.name)))
    cls = tf.AutoModelForImageTextToText if hasattr(config, "vision_config") else tf.AutoModelForCausalLM
    model = cls.from_config(config).to(torch.float32 if is_float32 else torch.bfloat16)
    start = {name: value.detach().float().clone() for name, value in model.named_parameters()}
    # Norms begin as 1, biases as 0.
    start = {name: value + 0.3 * torch.randn_like(value) * (value.ndim == 1) for name, value in start.items()}
    for name in names:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key] + SIGMA[name] * torch.randn_like(start[key]))
        size = sum(p.numel() for p in model.parameters()) * 2 // num_shards + 1000
        model.save_pretrained(folder / name, max_shard_size=size)
        if words:
            write_tokenizer(folder / name, words)


def write_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write a tokenizer of these words, after four special tokens."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", "<pad>", *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _adapter(folder: Path) -> None:
    """Write a LoRA adapter for ``llama/base``."""
    import peft
    import torch
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(folder / "llama" / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")


def with_paths(value: Any, folder: Path) -> Any:
    """Return a configuration with the models' names as paths: ``llama/a`` becomes ``FOLDER/llama/a``."""
    if isinstance(value, Mapping):
        return {
            key: _path(item, folder) if key in _MODEL_KEYS else with_paths(item, folder) for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_paths(item, folder) for item in value]
    return value


_MODEL_KEYS = frozenset({"model", "base_model", "tokenizer_source"})


def _path(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or value in {"union", "base"}:
        return with_paths(value, folder)
    return "+".join(str(folder / part) for part in value.split("+"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content
