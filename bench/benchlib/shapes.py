"""Models by their shapes: grids of equal tensors, Llamas of any width, and the real large ones as sparse files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from metagpt_fast.dtypes import BF16, DType
from metagpt_fast.family import LlamaShape, ModelShape
from metagpt_fast.output_shards import OutputTensor, index_file_name, index_json, plan_shards

_TENSORS_PER_LAYER = 10
_NUM_LAYERS = 16
_VOCAB_SIZE = 32000
_HEAD_SIZE = 128

# The sizes that Llama 3.1's config.json give.
REAL_LLAMAS: dict[str, LlamaShape] = {
    "70B": LlamaShape(8192, 28672, 80, 64, 8, 128256),
    "405B": LlamaShape(16384, 53248, 126, 128, 8, 128256),
}


@dataclass(frozen=True, slots=True)
class TensorGrid:
    """A model of ``num_tensors`` tensors of one size, ten to a layer: what a count costs, apart from bytes."""

    num_tensors: int
    rows: int
    columns: int

    def tensors(self, dtype: DType) -> list[OutputTensor]:
        """Return the tensors, in the order of their layers."""
        return [
            OutputTensor(f"model.layers.{i // _TENSORS_PER_LAYER}.w{i % _TENSORS_PER_LAYER}.weight", dtype,
                         (self.rows, self.columns))
            for i in range(self.num_tensors)
        ]  # fmt: skip

    def config(self, dtype: DType) -> dict[str, object]:
        """Return a config.json that no library loads."""
        return {"model_type": "tensor_grid", "torch_dtype": dtype.torch_name}


def llama_of_width(hidden_size: int) -> LlamaShape:
    """Return a Llama of 16 layers, 147 tensors whatever its width, a multiple of 128."""
    return LlamaShape(hidden_size, hidden_size * 11 // 4, _NUM_LAYERS, hidden_size // _HEAD_SIZE, 1, _VOCAB_SIZE)


def num_parameters(shape: ModelShape) -> int:
    """Return the number of elements of all tensors."""
    return sum(tensor.numel for tensor in shape.tensors(BF16))


def write_sparse_model(folder: Path, shape: ModelShape, max_shard_nbytes: int) -> int:
    """Write a model whose headers and index are those of a real one in bf16, and whose data are holes.

    Args:
        folder: to make.
        shape: of the model.
        max_shard_nbytes: the largest size of a shard.

    Returns:
        The number of shards.
    """
    folder.mkdir(parents=True)
    shards = plan_shards(shape.tensors(BF16), max_shard_nbytes)
    for shard in shards:
        with (folder / shard.file_name).open("wb") as file:
            file.write(shard.header)
            os.truncate(file.fileno(), shard.nbytes)
    if len(shards) > 1:
        (folder / index_file_name(shards)).write_bytes(index_json(shards))
    (folder / "config.json").write_text(json.dumps(shape.config(BF16)), encoding="utf-8")
    return len(shards)
