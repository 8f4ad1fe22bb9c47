"""The sizes of merges: of real models, and of a family that is made for measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..dtypes import BF16
from ..family import LlamaShape, family_nbytes
from ..layer_names import split_name
from ..output_shards import OutputTensor

NUM_MODELS = 3
GRANULARITIES = ("model", "layer")

# From their config.json: Llama 2 7B, Llama 3.1 70B and 405B.
MODELS = {
    "7 B": LlamaShape(4096, 11008, 32, 32, 32, 32000),
    "70 B": LlamaShape(8192, 28672, 80, 64, 8, 128256),
    "405 B": LlamaShape(16384, 53248, 126, 128, 8, 128256),
}

_HEAD_SIZE = 64
_HIDDEN_SIZES = (2048, 1024, 512, 256, 128, 64)
_MIN_LAYERS = 4


@dataclass(frozen=True)
class Work:
    """A merge of models of one dtype.

    Attributes:
        scopes: bytes of base and models, scope by scope, in order.
        num_models: T, without the base.
    """

    scopes: tuple[int, ...]
    num_models: int

    @property
    def nbytes_in(self) -> int:
        """Return the bytes of base and models."""
        return sum(self.scopes)

    @property
    def nbytes_out(self) -> float:
        """Return the bytes of the merged model."""
        return self.nbytes_in / (1 + self.num_models)


def work_of(shape: LlamaShape, granularity: str, num_models: int = NUM_MODELS) -> Work:
    """Return the merge of a base and ``num_models`` of this shape in bf16.

    Args:
        shape: that of all models.
        granularity: ``model``, one scope; or ``layer``, one for each layer and one for each tensor outside of them.
        num_models: T.
    """
    nbytes = _nbytes_by_scope(shape.tensors(BF16), granularity)
    return Work(tuple((1 + num_models) * each for each in nbytes), num_models)


def shape_of_size(nbytes: int) -> LlamaShape:
    """Return a Llama-like shape whose bf16 weights take about ``nbytes``; at least 0.3 MB."""
    for hidden in _HIDDEN_SIZES:
        num_heads = hidden // _HEAD_SIZE
        shape = LlamaShape(hidden, 11 * hidden // 4, 1, num_heads, max(1, num_heads // 8), 8 * hidden)
        one, two = (family_nbytes(replace(shape, num_layers=num_layers), 0) for num_layers in (1, 2))
        num_layers = 1 + (nbytes - one) // (two - one)
        if num_layers >= _MIN_LAYERS:
            break
    return replace(shape, num_layers=max(1, num_layers))


def _nbytes_by_scope(tensors: Iterable[OutputTensor], granularity: str) -> list[int]:
    nbytes: dict[object, int] = {}
    for tensor in tensors:
        split = split_name(tensor.name)
        scope: object = "" if granularity == "model" else tensor.name if split is None else split.layer
        nbytes[scope] = nbytes.get(scope, 0) + tensor.nbytes
    return list(nbytes.values())
