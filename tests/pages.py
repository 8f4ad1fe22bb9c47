"""Measurements made by hand, and a page's elements as a browser would see them."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np

from metagpt_fast.measurement import Measurement
from metagpt_fast.plan import layer_of

VOID = {"meta", "br", "img", "link", "input", "hr"}


def make_measurement(names, gram, *, labels=None, base="base", numels=None):
    """A measurement of these tensors; float64 ``[N, 1 + T, 1 + T]``."""
    gram = np.asarray(gram, np.float64)
    labels = tuple(labels or (f"m{t}" for t in range(1, gram.shape[1])))
    return Measurement(
        base=base,
        models=tuple(f"/models/{label}" for label in labels),
        labels=labels,
        names=tuple(names),
        numels=np.full(len(names), 64, np.int64) if numels is None else np.asarray(numels, np.int64),
        layers=tuple(map(layer_of, names)),
        gram=gram,
        fingerprints=tuple([] for _ in range(1 + len(labels))),
    )


def random_measurement(num_models, num_layers, *, labels=None, seed=0):
    """A Llama-shaped model: seven projections and two norms in each layer, and three tensors outside."""
    rng = np.random.default_rng(seed)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    modules = [f"self_attn.{name}.weight" for name in projections]
    modules += [f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    modules += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{module}" for layer in range(num_layers) for module in modules]
    names += ["model.norm.weight", "lm_head.weight"]
    # Vectors in 24 dimensions, of which all models share the second.
    vectors = rng.standard_normal((len(names), 1 + num_models, 24))
    sizes = np.array([20.0, *np.geomspace(0.4, 0.05, num_models)])
    depth = np.linspace(0.4, 1.6, len(names))[:, None] * rng.uniform(0.8, 1.2, (len(names), 1))
    vectors[:, 1:, 1] += 1.5
    vectors *= (sizes * np.concatenate([np.ones_like(depth), np.repeat(depth, num_models, axis=1)], axis=1))[..., None]
    numels = [1 << 24 if "norm" not in name else 1 << 12 for name in names]
    return make_measurement(names, vectors @ vectors.transpose(0, 2, 1), labels=labels, numels=numels)


class Page(HTMLParser):
    """The elements of a page with their attributes, the texts of each kind of element, and errors of nesting."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append((tag, len(self.texts[tag]) - 1))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data):
        for tag, index in self.open:
            self.texts[tag][index] += data

    def tags(self):
        return {tag for tag, _ in self.elements}

    def with_class(self, name):
        return [(tag, attrs) for tag, attrs in self.elements if name in attrs.get("class", "").split()]
