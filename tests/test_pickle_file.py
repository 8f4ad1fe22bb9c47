"""PyTorch files: their tensors are where torch finds them, merged as safetensors are; nothing in them is run."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import metagpt_fast as mf
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.errors import CheckpointError

from .checkpoints import tensor_bytes

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def state(seed: int) -> dict[str, torch.Tensor]:
    """Like a small language model: tied embeddings, a view of a larger tensor, integers, nothing, a scalar."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(31, 8, generator=generator).to(torch.bfloat16)
    weights = {
        f"model.layers.{layer}.w": torch.randn(17, 9, generator=generator).to(DTYPES[layer]) for layer in range(4)
    }
    rows = torch.randn(40, 5, generator=generator)
    return {
        "model.embed_tokens.weight": embedding,
        **weights,
        "model.some_rows": rows[7:19],
        "model.position_ids": torch.arange(12),
        "model.nothing": torch.empty(0, 3),
        "model.scale": torch.tensor(0.5 + seed),
        "lm_head.weight": embedding,
    }


def as_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the same tensors with the official writer, which refuses shared memory."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write two shards and the index that transformers wrote in its time."""
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable() or "\n" in message
    assert len(message) < 2500
    return message


def test_tensors_are_where_torch_finds_them(tmp_path: Path) -> None:
    tensors = state(1)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    content = path.read_bytes()
    found = open_checkpoint(path).tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        source = found[name]
        assert source.shape == tuple(tensor.shape)
        raw = (
            np.frombuffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), np.uint8).tobytes()
            if (tensor.numel())
            else b""
        )
        assert content[source.data_offset : source.data_offset + source.nbytes] == raw, name


@pytest.mark.parametrize("method", ["metagpt", "ties"])
def test_merged_as_safetensors_are(tmp_path: Path, method: str) -> None:
    """A file, shards and a bare file beside each other; the output is the same, and has a record that verifies."""
    states = [state(seed) for seed in range(4)]
    for index, tensors in enumerate(states):
        folder = tmp_path / f"safe{index}"
        folder.mkdir()
        as_safetensors(tensors, folder / "model.safetensors")
    for index in (0, 2):
        (tmp_path / f"bin{index}").mkdir()
        torch.save(states[index], tmp_path / f"bin{index}/pytorch_model.bin")
    (tmp_path / "bin0/training_args.bin").write_bytes(b"something else")
    write_shards(tmp_path / "bin1", states[1])
    torch.save({"state_dict": states[3], "epoch": 3}, tmp_path / "bin3.ckpt")
    pickled = [tmp_path / name for name in ("bin0", "bin1", "bin2", "bin3.ckpt")]
    mixed = [pickled[0], tmp_path / "safe1", *pickled[2:]]
    safe = [tmp_path / f"safe{index}" for index in range(4)]
    for name, (base, *models) in {"safe": safe, "pickled": pickled, "mixed": mixed}.items():
        mf.merge(base, models, tmp_path / f"out {name}", method=method)
    expected = tensor_bytes(tmp_path / "out safe")
    assert tensor_bytes(tmp_path / "out pickled") == expected
    assert tensor_bytes(tmp_path / "out mixed") == expected
    assert mf.verify(tmp_path / "out pickled", full=True).ok
    assert {path.suffix for path in (tmp_path / "out pickled").iterdir()} == {".safetensors", ".json", ".md"}


def test_safetensors_come_first(tmp_path: Path) -> None:
    as_safetensors(state(1), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert open_checkpoint(tmp_path).shards[0].path.name == "model.safetensors"


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    torch.save({"a": torch.ones(3), "b": Runs(mark)}, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path / "pytorch_model.bin")
    assert "names something that is no tensor" in message
    assert "getattr" in message
    assert not mark.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "this file proves nothing"


def save_legacy(path: Path) -> None:
    torch.save(state(1), path, _use_new_zipfile_serialization=False)


def save_compressed(path: Path) -> None:
    rewrite(path, zipfile.ZIP_DEFLATED)


NOT_A_TENSOR = "no tensor, which loading it would make"
BYTES = b"cbuiltins\nbytearray\n(I6000000000\ntR."
HASH_BOMB = (
    b"\x80\x02}(K\x01K\x02\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\x01u."
)


def rewrite(
    path: Path,
    compression: int = zipfile.ZIP_STORED,
    twice: bool = False,
    pickle: bytes | None = None,
    byteorder: bytes | None = None,
) -> None:
    """Write the archive again, by another hand."""
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, original in records.items():
            changed = {"data.pkl": pickle, "byteorder": byteorder}.get(name.rpartition("/")[2])
            content = original if changed is None else changed
            for _ in range(1 + (twice and name.endswith("data/0"))):
                archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def save_twice(path: Path) -> None:
    rewrite(path, twice=True)


BROKEN = {
    "legacy": (save_legacy, "is not a file that torch.save wrote since PyTorch 1.6"),
    "compressed": (save_compressed, "is compressed"),
    "two of one name": (save_twice, "two records of one name"),
    "transposed": (lambda path: torch.save({"a": torch.ones(3, 4).T}, path), "not as they lie in the file"),
    "expanded": (lambda path: torch.save({"a": torch.ones(1, 4).expand(3, 4)}, path), "not as they lie in the file"),
    "sparse": (lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), NOT_A_TENSOR),
    "no tensor": (lambda path: torch.save({"a": 3}, path), "is not a plain tensor"),
    "a list": (lambda path: torch.save([torch.ones(3)], path), "does not hold a state dict"),
    "a name that is none": (lambda path: torch.save({1: torch.ones(3)}, path), "a name that no tensor can have"),
    "a name that moves the cursor": (lambda path: torch.save({"\x1b[2J": torch.ones(3)}, path), "control character"),
    "a name that the format has": (lambda path: torch.save({"__metadata__": torch.ones(3)}, path), "can have"),
    "negative view": (lambda path: torch.save({"a": torch._neg_view(torch.ones(3))}, path), "not as they lie"),
    "conjugate view": (lambda path: torch.save({"a": (1j * torch.ones(3)).conj()}, path), "not as they lie"),
    "quantized": (lambda path: torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, path),
                  NOT_A_TENSOR),
    "meta": (lambda path: torch.save({"a": torch.empty(3, device="meta")}, path), NOT_A_TENSOR),
    "big endian": (lambda path: rewrite(path, byteorder=b"big"), "another byte order"),
    "large memory": (lambda path: rewrite(path, pickle=BYTES), "builtins bytearray"),
    "long to hash": (lambda path: rewrite(path, pickle=HASH_BOMB), "tuples of tuples"),
    "many operations": (lambda path: rewrite(path, pickle=b"N" * 4_000_001 + b"."), "more than 4000000 operations"),
    "nothing": (lambda path: torch.save({}, path), "holds no tensors"),
    "complex": (lambda path: torch.save({"a": torch.ones(3, dtype=torch.complex128)}, path), "unknown dtype"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", BROKEN)
def test_what_is_refused(tmp_path: Path, label: str) -> None:
    save, says = BROKEN[label]
    save(tmp_path / "model.bin")
    assert says in refused(tmp_path / "model.bin")


def test_records_in_another_order_than_torch_writes_them(tmp_path: Path) -> None:
    """Names count, not places."""
    path = tmp_path / "model.bin"
    tensors = {name: torch.full((1000,), float(i)) for i, name in enumerate("abc")}
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    data = [record for record in records if "/data/" in record[0]]
    others = [record for record in records if "/data/" not in record[0]]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*others, *reversed(data)]:
            archive.writestr(name, content)
    content = path.read_bytes()
    for name, source in open_checkpoint(path).tensors.items():
        found = np.frombuffer(content, np.float32, 1000, source.data_offset)
        assert np.array_equal(found, tensors[name].numpy())


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state(1), tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    message = refused(tmp_path / "pytorch_model.bin")
    assert "only torch can read" in message
    assert "pip install 'metagpt_fast[gpu]'" in message


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: refused with one message, or every tensor lies within the file."""
    path = tmp_path / "model.bin"
    torch.save(state(1), path)
    content = path.read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for number in range(300):
        damaged = bytearray(content[: rng.randrange(len(content))] if number % 3 == 0 else content)
        for _ in range(rng.randrange(1, 4) if number % 3 else 0):
            # Half of it where the archive's directory and the pickle are.
            at = (
                rng.randrange(len(damaged))
                if rng.random() < 0.5
                else rng.choice((rng.randrange(900), -rng.randrange(1, 900)))
            )
            damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            num_refused += 1
            assert len(str(error)) < 2500
        else:
            for source in checkpoint.tensors.values():
                assert 0 <= source.data_offset <= source.data_offset + source.nbytes <= len(damaged)
    assert num_refused > 150
