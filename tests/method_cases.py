"""Every method with parameters with which it does something, and checkpoints that have all kinds of tensors."""

from __future__ import annotations

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.methods import METHODS

# A matrix, a tensor of several spans, a vector, a scalar, an empty tensor.
SHAPES = {
    "layers.0.a.weight": (300, 7),
    "layers.0.large": (600_003,),
    "layers.1.b.weight": (64, 65),
    "layers.1.norm": (33,),
    "scale": (),
    "none": (0, 4),
    "head": (51, 40),
}
DTYPES = [(BF16, BF16, F32, F64), (BF16,), (F16, F32), (F32, F16, BF16)]

# Parameters with which each method does something; methods of two models get the first fine-tune only.
SETTINGS: dict[str, dict[str, object]] = {
    "ties": {"density": (0.3, 0.5, 0.7), "weight": (1.0, 0.5, 0.8)},
    "dare_linear": {"density": 0.6, "weight": 0.3},
    "dare_ties": {"density": (0.6, 0.4, 1.0), "lambda": 0.7},
    "breadcrumbs": {"density": 0.5, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.0, "rescale": True},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.6, "epsilon": 0.2},
    "sce": {"select_topk": 0.4},
    "nearswap": {"t": 0.001},
    "ram": {"epsilon": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": (0.4, 0.7)},
    "passthrough": {"scale": 0.9},
}
NUM_MODELS = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
CASES = [
    *((name, SETTINGS.get(name, {})) for name in METHODS),
    ("ties", {"density": 0.4, "coefficients": "metagpt"}),
    ("dare_linear", {"density": 0.4, "coefficients": "metagpt", "coefficients_from": "raw", "exponent": 1.0}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"nuslerp_flatten": False, "weight": 0.5}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": (0.3, 0.9)}),
]


def merge(base, models, out, method, parameters, **settings):
    chosen = models[: NUM_MODELS.get(method, len(models))]
    return mf.merge(base, chosen, out, method=method, parameters=parameters, **settings)
