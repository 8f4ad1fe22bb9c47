"""Folders: which files make a checkpoint, and what index and shards must agree on."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.errors import CheckpointError

from .hostile import ZEROS, A, entry, file_bytes, write_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    FIRST: file_bytes({"__metadata__": {"format": "pt"}, "b": entry("F32", [1], 4, 8), "a": A}, ZEROS),
    SECOND: file_bytes({"c": entry("BF16", [2, 1], 0, 4)}, ZEROS[:4]),
}
WEIGHT_MAP = {"a": FIRST, "b": FIRST, "c": SECOND}
ONE = file_bytes({"a": A}, ZEROS[:4])


def refusal(path: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def test_shards_with_an_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_shards(tmp_path / "math", SHARDS, WEIGHT_MAP)))
    assert checkpoint.path == tmp_path / "math"
    assert checkpoint.label == "math"
    assert not checkpoint.is_bare_file
    assert checkpoint.metadata == {"format": "pt"}
    assert [shard.path.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    second = checkpoint.tensors["c"]
    assert (second.dtype.name, second.shape, second.numel, second.nbytes) == ("BF16", (2, 1), 2, 4)
    assert second.path == tmp_path / "math" / SECOND
    assert second.data_offset == len(SHARDS[SECOND]) - 4
    for shard in checkpoint.shards:
        content = SHARDS[shard.path.name]
        assert shard.nbytes == len(content)
        assert shard.mtime_ns == shard.path.stat().st_mtime_ns
        header_nbytes = int.from_bytes(content[:8], "little")
        assert shard.header_sha256 == sha256(content[8 : 8 + header_nbytes]).hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "any.safetensors"])
def test_single_file_in_a_folder_and_bare(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ONE)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"._{name}").write_bytes(b"left by macOS")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    bare = open_checkpoint(tmp_path / name)
    assert bare.is_bare_file
    assert bare.label == name


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "other"])
def test_stems_of_an_index(stem: str, tmp_path: Path) -> None:
    shards = {name.replace("model", stem): content for name, content in SHARDS.items()}
    weight_map = {tensor: name.replace("model", stem) for tensor, name in WEIGHT_MAP.items()}
    write_shards(tmp_path, shards, weight_map, stem=stem)
    (tmp_path / "consolidated.safetensors").write_bytes(ONE)
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_diffusers_variant_index(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, WEIGHT_MAP)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_single_file_comes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, WEIGHT_MAP)
    (tmp_path / "model.safetensors").write_bytes(ONE)
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_hugging_face_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--math-7b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    index = json.dumps({"weight_map": WEIGHT_MAP}).encode()
    for name, content in {**SHARDS, "model.safetensors.index.json": index}.items():
        blob = sha256(content).hexdigest()
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.label == "math-7b"
    assert [shard.path for shard in checkpoint.shards] == [snapshot / FIRST, snapshot / SECOND]
    assert "snapshots/0123abcd" in str(refusal(repository).hint)

    (snapshot / SECOND).resolve().unlink()
    error = refusal(snapshot)
    assert error.where == str(snapshot / SECOND)
    assert "symlink" in error.what
    assert "../../blobs/" in str(error.got)


def test_label_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(ONE)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(".").label == tmp_path.name
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert open_checkpoint("..").label == tmp_path.name


NO_CHECKPOINT: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "empty folder": ({}, ("no safetensors files", "got an empty folder", "expected model.safetensors")),
    "other files": ({"config.json": b"{}"}, ("no safetensors files", "got config.json")),
    "pickle": ({"optimizer.pt": b""}, ("pickle", "got optimizer.pt", "save_pretrained")),
    "gguf": ({"q4.gguf": b""}, ("GGUF", "got q4.gguf", "original")),
    "adapter": (
        {"adapter_model.safetensors": ONE, "adapter_config.json": b"{}"},
        ("LoRA", "merge_and_unload"),
    ),
    "adapter config": (
        {"adapter_config.json": b"{}", "adapter_model.bin": b""},
        ("LoRA", "merge_and_unload"),
    ),
    "several files": (
        {"x.safetensors": ONE, "y.safetensors": ONE},
        ("several", "got x.safetensors, y.safetensors"),
    ),
    "many files": ({f"{i}.safetensors": ONE for i in range(9)}, ("got 0.safetensors", "and 3 more")),
    "no index": (dict(SHARDS), ("without their index", FIRST, SECOND, "index.json")),
    "one shard of two": ({FIRST: SHARDS[FIRST]}, ("without their index", FIRST)),
    "two indexes": (
        {"x.safetensors.index.json": b"", "y.safetensors.index.json": b"", "x.safetensors": ONE},
        ("more than one index", "got x.safetensors.index.json, y.safetensors.index.json"),
    ),
    "pipeline": (
        {"unet/diffusion_pytorch_model.safetensors": ONE},
        ("no safetensors files", "one model's folder", "/unet"),
    ),
}


@pytest.mark.parametrize("label", NO_CHECKPOINT)
def test_folder_without_a_checkpoint(label: str, tmp_path: Path) -> None:
    files, says = NO_CHECKPOINT[label]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path)
    assert error.where == str(tmp_path)
    for part in says:
        assert part in str(error)


def test_one_shard_that_is_all(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(ONE)
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_wrong_kind_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, SHARDS, WEIGHT_MAP)
    error = refusal(tmp_path / "model.safetensors.index.json")
    assert "give the folder" in str(error)
    (tmp_path / "adapter_model.safetensors").write_bytes(ONE)
    assert "LoRA" in str(refusal(tmp_path / "adapter_model.safetensors"))
    monkeypatch.chdir(tmp_path)
    error = refusal("org/model-7b")
    assert "does not exist" in error.what
    assert "hf download org/model-7b" in str(error.hint)


OUTSIDE = [
    "../" + FIRST,
    "/etc/passwd",
    "sub/" + FIRST,
    "sub\\x",
    "C:x",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "\ud800",
    "é" * 128,  # 256 bytes, more than a name has
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_must_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / FIRST).write_bytes(ONE)
    write_shards(tmp_path / "model", SHARDS, {**WEIGHT_MAP, "a": name})
    error = refusal(tmp_path / "model")
    assert error.where == f"{tmp_path / 'model' / 'model.safetensors.index.json'}, tensor 'a'"
    assert "outside the folder" in error.what
    assert error.got == repr(name)


BROKEN_INDEXES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "shard missing": (
        {**WEIGHT_MAP, "d": "model-3.safetensors"},
        ("not there", "got 2 of 3, without model-3"),
    ),
    "tensor missing": (
        {**WEIGHT_MAP, "d": SECOND},
        (f"{SECOND}, tensor 'd'", "lacks", f"expected it in {SECOND}"),
    ),
    "tensor extra": (
        {"a": FIRST, "c": SECOND},
        (f"{FIRST}, tensor 'b'", "does not list", f"got it in {FIRST}"),
    ),
    "wrong shard": (
        {**WEIGHT_MAP, "b": SECOND},
        ("tensor 'b'", "another shard", f"got it in {FIRST}", f"expected it in {SECOND}"),
    ),
    "shard is a number": ({**WEIGHT_MAP, "b": 1}, ("index.json, tensor 'b'", "not a file name", "got int")),
    "control character": ({**WEIGHT_MAP, "\x1b": FIRST}, ("index.json, tensor '\\x1b'", "control character")),
    "empty": ({}, ("no usable weight_map", "got {}")),
}


@pytest.mark.parametrize("label", BROKEN_INDEXES)
def test_broken_weight_map(label: str, tmp_path: Path) -> None:
    weight_map, says = BROKEN_INDEXES[label]
    error = refusal(write_shards(tmp_path / "model", SHARDS, weight_map))
    for part in (str(tmp_path / "model"), *says):
        assert part in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object: got a list"),
        (b"{}", "no usable weight_map: got None"),
        (b'{"weight_map": []}', "no usable weight_map: got []"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' twice"),
        (b'{"weight_map": {"a": NaN}}', "NaN"),
        (b'{"weight_map": ' + b"[" * 200_000, "nested"),
        (b"\xff\xfe", "utf-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_broken_index_file(text: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    error = refusal(tmp_path)
    assert error.where == str(path)
    assert says in str(error)


def test_index_file_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 100_000_001)
    assert "got 100000001 bytes, expected at most 100000000" in str(refusal(tmp_path))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {**SHARDS, SECOND: file_bytes({"a": A}, ZEROS[:4])}
    error = refusal(write_shards(tmp_path / "model", shards, {"a": FIRST, "b": FIRST, "c": SECOND}))
    assert error.where == f"{tmp_path / 'model' / SECOND}, tensor 'a'"
    assert "two shards" in error.what
    assert error.got == f"also in {FIRST}"


def test_broken_shard_is_named(tmp_path: Path) -> None:
    shards = {**SHARDS, SECOND: SHARDS[SECOND][:-1]}
    error = refusal(write_shards(tmp_path / "model", shards, WEIGHT_MAP))
    assert error.where == str(tmp_path / "model" / SECOND)
    assert "truncated" in error.what


def test_mutated_indexes(tmp_path: Path) -> None:
    rng = random.Random(1234)
    folder = write_shards(tmp_path / "model", SHARDS, WEIGHT_MAP)
    path = folder / "model.safetensors.index.json"
    original = path.read_bytes()
    num_accepted = 0
    for number in range(800):
        mutated = bytearray(original)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(mutated))
            mutated[at : at + rng.randrange(3)] = rng.choice((b"", b"/", b'"', b"..", b"\\u0000", b"{", b"1", b"\xfe"))
        path.write_bytes(mutated)
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            continue
        num_accepted += 1
        owners = {name: source.path.name for name, source in checkpoint.tensors.items()}
        assert owners == WEIGHT_MAP == json.loads(mutated)["weight_map"], (number, mutated)
    assert 0 < num_accepted < 400


def test_fingerprint(tmp_path: Path) -> None:
    content = bytearray(file_bytes({"a": entry("U8", [200_000], 0, 200_000)}, bytes(200_000)))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    checkpoint = open_checkpoint(path)
    (found,) = checkpoint.fingerprint()
    assert list(found) == ["name", "nbytes", "mtime_ns", "header_sha256", "sample_sha256"]
    last = len(content) - 4096
    pages = [content[last * i // 15 :][:4096] for i in range(16)]
    assert found["sample_sha256"] == sha256(b"".join(pages)).hexdigest()
    assert (found["name"], found["nbytes"]) == ("model.safetensors", len(content))
    assert checkpoint.fingerprint() == [found]

    content[-1] = 1
    path.write_bytes(content)
    os.utime(path, ns=(0, found["mtime_ns"]))
    (changed,) = open_checkpoint(path).fingerprint()
    assert changed["header_sha256"] == found["header_sha256"]
    assert changed["sample_sha256"] != found["sample_sha256"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: os.truncate(path, 9), "changed since it was opened"),
        (lambda path: os.utime(path, ns=(0, 0)), "changed since it was opened"),
        (lambda path: path.unlink(), "does not exist"),
    ],
    ids=["shorter", "newer", "gone"],
)
def test_fingerprint_of_a_changed_file(change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ONE)
    checkpoint = open_checkpoint(tmp_path)
    change(path)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.fingerprint()


def test_fifty_thousand_tensors_open_fast(tmp_path: Path) -> None:
    num_tensors = 50_000
    header = {
        f"model.layers.{i}.experts.{i}.weight": entry("BF16", [4, 8], 64 * i, 64 * i + 64) for i in range(num_tensors)
    }
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, bytes(64 * num_tensors)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        checkpoint = open_checkpoint(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert len(checkpoint.tensors) == num_tensors
    assert gc.isenabled()
    assert min(seconds) < 2, "about 0.3 s on an idle core"
