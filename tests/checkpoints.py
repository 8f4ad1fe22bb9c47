"""Checkpoints on disk for whole merges: any dtypes, order, sharding and alignment, written byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from metagpt_fast.dtypes import BF16, DTYPES, F32, DType
from metagpt_fast.safetensors_file import read_header

from .arrays import FloatArray, Raw, decode, encode
from .hostile import entry, file_bytes

I64 = DTYPES["I64"]


@dataclass(frozen=True)
class Tensor:
    """One tensor's bytes."""

    dtype: DType
    shape: tuple[int, ...]
    raw: Raw

    @property
    def values(self) -> FloatArray:
        """The elements as float64, flat."""
        return decode(self.raw, self.dtype)


State = dict[str, Tensor]

# Like a language model's, with the odd ones: no dimensions, no elements, no layer, one element.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (97, 24),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1, 10)
        for name, shape in {"mlp.up.weight": (33, 24), "attn.q.weight": (24, 25), "norm.weight": (24,)}.items()
    },
    "model.empty": (0, 24),
    "model.layers.10.scale": (),
    "model.norm.weight": (1,),
    "lm_head.weight": (97, 24),
}


def tensor(values: object, dtype: DType = BF16, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of these values, rounded to ``dtype``."""
    array = np.asarray(values, np.float64)
    return Tensor(dtype, array.shape if shape is None else shape, encode(array.reshape(-1), dtype))


def integers(values: Sequence[int]) -> Tensor:
    """Return an int64 tensor, as position ids are."""
    return Tensor(I64, (len(values),), np.array(values, np.int64).view(np.uint8))


def random_states(
    seed: int,
    dtypes: Sequence[Sequence[DType]],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sigmas: Sequence[float] = (0.002, 0.001, 0.003, 0.0015, 0.0005),
) -> list[State]:
    """Return a base and its fine-tunes.

    Args:
        seed: of the random numbers.
        dtypes: per checkpoint, the base first, the dtypes that its tensors take in turn.
        shapes: of the tensors by name.
        sigmas: how far each fine-tune is from the base, whose weights are about 0.02.
    """
    rng = np.random.default_rng(seed)
    states: list[State] = [{} for _ in dtypes]
    for index, (name, shape) in enumerate((SHAPES if shapes is None else shapes).items()):
        numel = int(np.prod(shape))
        base = rng.normal(0.0, 0.02, numel)
        for number, (state, cycle) in enumerate(zip(states, dtypes, strict=True)):
            values = base + (rng.normal(0.0, sigmas[number - 1], numel) if number else 0.0)
            state[name] = tensor(values, cycle[index % len(cycle)], shape)
    return states


def write_state(
    path: Path, state: Mapping[str, Tensor], *, num_shards: int = 1, misalignment: int = 0, is_reversed: bool = False
) -> Path:
    """Write a checkpoint folder, or a bare file if ``path`` ends in ``.safetensors``.

    Args:
        path: what to make.
        state: the tensors.
        num_shards: files to distribute them over, turn by turn.
        misalignment: where the data of a file begins, in bytes beyond a multiple of 64.
        is_reversed: whether the tensors are stored in reverse order.
    """
    names = list(state)
    if is_reversed:
        names.reverse()
    if path.name.endswith(".safetensors"):
        path.write_bytes(shard_bytes(state, names, misalignment))
        return path
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "none", "torch_dtype": "bfloat16"}')
    if num_shards == 1:
        (path / "model.safetensors").write_bytes(shard_bytes(state, names, misalignment))
        return path
    weight_map = {}
    for index in range(num_shards):
        file_name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[index::num_shards]
        weight_map.update(dict.fromkeys(mine, file_name))
        if mine:
            (path / file_name).write_bytes(shard_bytes(state, mine, misalignment))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def shard_bytes(state: Mapping[str, Tensor], names: Iterable[str], misalignment: int = 0) -> bytes:
    """Return a safetensors file of these tensors, in this order."""
    header, data = {}, b""
    for name in names:
        begin = len(data)
        data += state[name].raw.tobytes()
        header[name] = entry(state[name].dtype.name, list(state[name].shape), begin, len(data))
    text = json.dumps(header)
    return file_bytes(text + " " * ((misalignment - 8 - len(text)) % 64), data)


def write_family(folder: Path, states: Sequence[Mapping[str, Tensor]], **layout: int) -> tuple[Path, list[Path]]:
    """Write ``base`` and ``m0``, ``m1`` ... into ``folder``."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in ("base", *(f"m{t}" for t in range(len(states) - 1)))]
    for path, state in zip(paths, states, strict=True):
        write_state(path, state, **layout)
    return paths[0], paths[1:]


def read_state(path: Path) -> State:
    """Read every tensor of a checkpoint folder or bare file."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    state: State = {}
    for file in files:
        memory = np.fromfile(file, np.uint8)
        for source in read_header(file).tensors:
            raw = memory[source.data_offset : source.data_offset + source.nbytes]
            state[source.name] = Tensor(source.dtype, source.shape, raw)
    return state


def tensor_bytes(path: Path) -> dict[str, bytes]:
    """Return what tensors an output holds, to compare two of them."""
    return {name: each.raw.tobytes() for name, each in sorted(read_state(path).items())}


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Return a hash of every file below ``folder``, and when it was changed."""
    return {
        str(path.relative_to(folder)): (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def three_models(folder: Path, **layout: int) -> tuple[Path, list[Path]]:
    """Write a base and three fine-tunes of two tensors, for tests that look at anything but the weights."""
    shapes = {"layers.0.a": (40, 30), "b": (77,)}
    return write_family(folder, random_states(7, [(BF16,), (BF16,), (F32,), (BF16,)], shapes), **layout)
