"""A GPT of half a million parameters: the model, its training, its loss on a text, and its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from texts import VOCAB_SIZE, Tokens
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    width: int = 96
    num_layers: int = 4
    num_heads: int = 4
    context: int = 96


class Block(nn.Module):
    """A decoder layer: attention, then a feed-forward network, each added to its normalised input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)
        self.register_buffer("mask", torch.full((shape.context,) * 2, -math.inf).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, time, width]`` to the same shape.

        Attention is written out, because the linearity check differentiates it forwards.
        """
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.mask[:time, :time]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class TinyGPT(nn.Module):
    """A decoder-only transformer over characters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(VOCAB_SIZE, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCAB_SIZE, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.num_layers) if is_residual else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, time, VOCAB_SIZE]`` of the next characters of ``[batch, time]``."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def train(model: TinyGPT, text: Tokens, *, steps: int, rate: float, batch: int, seed: int) -> float:
    """Train with AdamW, warm-up and cosine decay; returns the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 20)
    losses = []
    model.train()
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        starts = torch.randint(len(text) - model.shape.context - 1, (batch,), generator=generator)
        loss = _loss(model, _windows(text, starts.tolist(), model.shape.context))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.inference_mode()
def evaluate(model: TinyGPT, text: Tokens, num_windows: int) -> float:
    """Return the mean loss per character, in nats, over windows at even distances: the same for every model."""
    model.eval()
    starts = np.linspace(0, len(text) - model.shape.context - 2, num_windows).astype(int).tolist()
    losses = [
        _loss(model, _windows(text, starts[first : first + 64], model.shape.context)).item()
        * len(starts[first : first + 64])
        for first in range(0, num_windows, 64)
    ]
    return sum(losses) / num_windows


def windows_of(text: Tokens, num_windows: int, context: int) -> Tensor:
    """Return windows at even distances, int64 ``[num_windows, context]``."""
    starts = np.linspace(0, len(text) - context - 2, num_windows).astype(int).tolist()
    return _windows(text, starts, context)[:, :-1]


def save(model: TinyGPT, folder: Path) -> None:
    """Write a checkpoint as metagpt-fast and others read it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_gpt", **asdict(model.shape)}, indent=2) + "\n")


def load(folder: Path) -> TinyGPT:
    """Read a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    model = TinyGPT(Shape(**{name: config[name] for name in asdict(Shape())}))
    model.load_state_dict(load_state(folder))
    return model


def load_state(folder: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a checkpoint."""
    return load_file(folder / "model.safetensors")


def _windows(text: Tokens, starts: list[int], context: int) -> Tensor:
    return torch.from_numpy(np.stack([text[start : start + context + 1] for start in starts]).astype(np.int64))


def _loss(model: TinyGPT, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
