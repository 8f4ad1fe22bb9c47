"""What tensors' names say about layers: which layer of which stack, and what comes before the first one.

There is no list of architectures. A stack is what the names of its layers begin with: ``model.layers.`` (Llama),
``transformer.h.`` or ``h.`` (GPT-2), ``gpt_neox.layers.``. A tensor outside of the stacks comes before the layers if a
word of its name says that it embeds something, and after them if not: final norms, heads, poolers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Nine digits: more are no layer, and would be slow to convert.
_LAYER = re.compile(r"((?:[^.]*\.)*?)([0-9]{1,9})(?=\.)")
_WORDS = re.compile(r"[._]")
# embed_tokens, wte and wpe, word_embeddings, tok_embeddings, embed_in, embedding_norm, token_type_embeddings;
# rotary_pos_emb.inv_freq; T5's shared.
_EMBEDDING = frozenset({"embed", "embeds", "embd", "emb", "embedding", "embeddings", "wte", "wpe", "shared"})
_OUTPUT = re.compile(r"(^|\.)(embed_out|lm_head|output)(\.|$)")


class LayerName(NamedTuple):
    """A name in three parts: ``model.layers.``, 12, ``.self_attn.q_proj.weight``."""

    stack: str
    layer: int
    rest: str


def split_name(name: str) -> LayerName | None:
    """Return the parts of the name of a layer's tensor, or None for a tensor outside of the layers.

    The first component that is a number is the layer's, as in :func:`metagpt_fast.plan.layer_of`.
    """
    match = _LAYER.match(name)
    return LayerName(match[1], int(match[2]), name[match.end() :]) if match else None


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside of the layers comes before them: an embedding that is not the output's."""
    return not _OUTPUT.search(name) and not _EMBEDDING.isdisjoint(_WORDS.split(name))
