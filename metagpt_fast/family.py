"""Makes families of checkpoints for demo, tests and benchmarks: a Llama-shaped base and fine-tunes of it.

The weights are random: N(0, 0.02²) for the base, as a model is initialised, and for each fine-tune the base
plus a task vector of its own size with a small part that all of them share. What surrounds the numbers is
real: names, shapes, dtypes, shards, index and config.json are those of a model that transformers loads.

Speed comes from drawing normals once, into a pool, and cutting every tensor from it at random offsets; memory
does not grow with the model.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .dtypes import BF16, DType
from .errors import RecipeError
from .info import num_cores_usable
from .output_shards import OutputTensor, plan_shards
from .reference import round_from_float32, to_float64
from .writer import CheckpointWriter, OutputSlot

BASE_NAME = "base"
BASE_SIGMA = 0.02
# Each task vector is √(1−s²) its own noise and s noise that all share, so the cosines are about s² = 0.0625.
SHARED_PART = 0.25

_CHUNK_NUMEL = 1 << 17
_POOL_NUMEL = 1 << 20
_MIB = 1 << 20

FloatArray = NDArray[np.float32]


class ModelShape(Protocol):
    """What a family is made from: the tensors of a model, and its config.json."""

    def tensors(self, dtype: DType) -> list[OutputTensor]:
        """Return every tensor of the model, in the order of its layers."""

    def config(self, dtype: DType) -> dict[str, object]:
        """Return the content of config.json."""


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama model, by the names of its config.json where those are clear."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise RecipeError(
                "heads do not divide the model evenly",
                where="LlamaShape",
                got=f"{self.hidden_size=}, {self.num_heads=}, {self.num_kv_heads=}".replace("self.", ""),
                expected="hidden_size a multiple of num_heads, num_heads a multiple of num_kv_heads",
            )

    def tensors(self, dtype: DType) -> list[OutputTensor]:
        """Return every tensor of the model, in the order of its layers."""
        hidden, kv = self.hidden_size, self.hidden_size // self.num_heads * self.num_kv_heads
        block = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, self.intermediate_size),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
        shapes["model.norm"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return [OutputTensor(f"{name}.weight", dtype, shape) for name, shape in shapes.items()]

    def config(self, dtype: DType) -> dict[str, object]:
        """Return what transformers needs in config.json to build the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": BASE_SIGMA,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype.torch_name,
        }


@dataclass(frozen=True, slots=True)
class FamilyPreset:
    """A family by name: its shape and the largest size of its shards."""

    shape: LlamaShape
    max_shard_nbytes: int


PRESETS: dict[str, FamilyPreset] = {
    "tiny": FamilyPreset(LlamaShape(64, 128, 2, 4, 2, 256), 128 * 1024),
    "demo": FamilyPreset(LlamaShape(768, 2048, 8, 12, 4, 16000), 64 * _MIB),
    "1.1b": FamilyPreset(LlamaShape(2048, 5632, 22, 32, 4, 32000), 1024 * _MIB),
}
NAMES = ("chat", "math", "code")
TASK_VECTOR_SIGMAS = (1e-3, 0.5e-3, 0.25e-3)


@dataclass(frozen=True, slots=True)
class Family:
    """A family on disk; ``nbytes`` and ``num_shards`` are those of one model."""

    base: Path
    models: tuple[Path, ...]
    num_parameters: int
    nbytes: int
    num_shards: int


def make_family(
    folder: str | Path,
    *,
    shape: ModelShape,
    names: Sequence[str] = NAMES,
    task_vector_sigmas: Sequence[float] = TASK_VECTOR_SIGMAS,
    max_shard_nbytes: int,
    seed: int,
    dtype: DType = BF16,
    advance: Callable[[int], None] | None = None,
) -> Family:
    """Write ``folder/base`` and one ``folder/<name>`` per fine-tune.

    The same arguments give the same bytes, on any number of threads.

    Args:
        folder: made if it is missing; the models' folders must not exist.
        shape: the sizes of all the models.
        names: the fine-tunes' folders.
        task_vector_sigmas: standard deviation of each fine-tune's change, before rounding to ``dtype``.
        max_shard_nbytes: the largest size of a shard.
        seed: of the random numbers.
        dtype: of every tensor; BF16 is the fast one.
        advance: called with bytes of progress, from any thread; :func:`family_nbytes` is the total.

    Raises:
        OutputError: a folder exists already, or the disk is too small.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shape.tensors(dtype)
    shards = plan_shards(tensors, max_shard_nbytes)
    config = json.dumps(shape.config(dtype), indent=2).encode() + b"\n"
    paths = [folder / name for name in (BASE_NAME, *names)]
    pool = _NoisePool(task_vector_sigmas, dtype, seed)
    local = threading.local()
    with ExitStack() as stack:
        writers = [stack.enter_context(CheckpointWriter(path, shards)) for path in paths]

        def fill(chunk: tuple[int, int, int]) -> None:
            index, start, numel = chunk
            tensor = tensors[index]
            if not hasattr(local, "scratch"):
                local.scratch = _Scratch(dtype)
            is_norm = len(tensor.shape) == 1
            pieces = pool.draw((seed, index, start), numel, is_norm, local.scratch)
            for writer, piece in zip(writers, pieces, strict=True):
                _pwrite(writer.slot(tensor.name), start * dtype.itemsize, piece)
                if advance is not None:
                    advance(piece.nbytes)

        executor = stack.enter_context(ThreadPoolExecutor(num_cores_usable()))
        for _ in executor.map(fill, _chunks(tensors)):
            pass
        for writer in writers:
            writer.add_file("config.json", config)
            writer.finish()
    return Family(
        base=paths[0],
        models=tuple(paths[1:]),
        num_parameters=sum(tensor.numel for tensor in tensors),
        nbytes=sum(shard.nbytes for shard in shards),
        num_shards=len(shards),
    )


def family_nbytes(shape: LlamaShape, num_models: int, dtype: DType = BF16) -> int:
    """Return the bytes of all weights of a base and ``num_models`` fine-tunes."""
    return (1 + num_models) * sum(tensor.nbytes for tensor in shape.tensors(dtype))


class _Scratch:
    """One thread's buffers, which live as long as it does."""

    def __init__(self, dtype: DType) -> None:
        self.values = np.empty(_CHUNK_NUMEL, np.float32)
        self.bits = np.empty(_CHUNK_NUMEL, np.uint32)
        self.encoded = np.empty(_CHUNK_NUMEL * dtype.itemsize, np.uint8)


class _NoisePool:
    """Normals drawn once, scaled for the base's weights and for each task vector's own and shared part."""

    def __init__(self, task_vector_sigmas: Sequence[float], dtype: DType, seed: int) -> None:
        noise = np.random.default_rng(seed).standard_normal(_POOL_NUMEL + _CHUNK_NUMEL, np.float32)
        own_part = math.sqrt(1 - SHARED_PART**2)
        self._dtype = dtype
        self._base = _Encoded(noise * np.float32(BASE_SIGMA), dtype)
        self._ones = _Encoded(np.ones(_CHUNK_NUMEL, np.float32), dtype)
        self._own = [noise * np.float32(sigma * own_part) for sigma in task_vector_sigmas]
        self._shared = [noise * np.float32(sigma * SHARED_PART) for sigma in task_vector_sigmas]

    def draw(self, key: tuple[int, ...], numel: int, is_norm: bool, scratch: _Scratch) -> Iterator[NDArray[np.uint8]]:
        """Yield ``numel`` elements of the base and of each fine-tune as bytes, valid until the next step."""
        offsets = np.random.default_rng(key).integers(_POOL_NUMEL, size=2 + len(self._own))
        base, offset = (self._ones, 0) if is_norm else (self._base, int(offsets[0]))
        shared_offset = int(offsets[1])
        yield base.raw[offset * self._dtype.itemsize : (offset + numel) * self._dtype.itemsize]
        weights = base.values[offset : offset + numel]
        values = scratch.values[:numel]
        for own, shared, start in zip(self._own, self._shared, offsets[2:].tolist(), strict=True):
            np.add(weights, own[start : start + numel], out=values)
            np.add(values, shared[shared_offset : shared_offset + numel], out=values)
            yield (_to_bf16(values, scratch) if self._dtype is BF16 else round_from_float32(values, self._dtype))


class _Encoded:
    """Values that ``dtype`` can hold, both as float32 and as bytes."""

    def __init__(self, values: FloatArray, dtype: DType) -> None:
        self.raw = round_from_float32(values, dtype)
        self.values = to_float64(self.raw, dtype).astype(np.float32)


def _to_bf16(values: FloatArray, scratch: _Scratch) -> NDArray[np.uint8]:
    """Round finite float32 to the nearest bfloat16, ties to even; destroys ``values``.

    bits + 0x7fff + (bit 16), cut to the upper half, in place: about twenty times faster than the reference.
    """
    bits, increment = values.view(np.uint32), scratch.bits[: values.size]
    np.right_shift(bits, np.uint32(16), out=increment)
    np.bitwise_and(increment, np.uint32(1), out=increment)
    np.add(increment, np.uint32(0x7FFF), out=increment)
    np.add(bits, increment, out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    encoded = scratch.encoded[: 2 * values.size]
    np.copyto(encoded.view(np.uint16), bits, casting="unsafe")
    return encoded


def _chunks(tensors: Sequence[OutputTensor]) -> Iterator[tuple[int, int, int]]:
    """Yield (index of the tensor, first element, number of elements) for all of them."""
    for index, tensor in enumerate(tensors):
        for start in range(0, tensor.numel, _CHUNK_NUMEL):
            yield index, start, min(_CHUNK_NUMEL, tensor.numel - start)


def _pwrite(slot: OutputSlot, offset: int, content: NDArray[np.uint8]) -> None:
    view = content.data
    while view:
        num_written = os.pwrite(slot.fd, view, slot.data_offset + offset)
        offset += num_written
        view = view[num_written:]
