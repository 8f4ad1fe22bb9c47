"""One file: broken ones are refused with a full message, sound ones give what the official reader gives."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from metagpt_fast.checkpoint import Checkpoint, open_checkpoint
from metagpt_fast.errors import CheckpointError

from .hostile import BROKEN_FILES, SOUND_FILES, ZEROS, A, BrokenFile, entry, file_bytes

NUM_MUTATIONS = 1500
DTYPE_NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "U16": np.uint16,
    "I8": np.int8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def check_as_official(checkpoint: Checkpoint, content: bytes) -> None:
    """Names, dtypes, shapes and the bytes at each tensor's offset are those the official reader finds."""
    official = {name: (view["dtype"], list(view["shape"]), bytes(view["data"])) for name, view in deserialize(content)}
    ours = {
        name: (
            source.dtype.name,
            list(source.shape),
            content[source.data_offset : source.data_offset + source.nbytes],
        )
        for name, source in checkpoint.tensors.items()
    }
    assert ours == official
    ends = [source.data_offset + source.nbytes for source in checkpoint.tensors.values()]
    assert ends == sorted(ends)
    assert ends[-1] == len(content)


@pytest.mark.parametrize("broken", BROKEN_FILES, ids=lambda broken: broken.label)
def test_broken_file_is_refused_with_a_full_message(broken: BrokenFile, tmp_path: Path) -> None:
    path = write(tmp_path, broken.content)
    for given_path in (path, tmp_path):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(given_path)
        message = str(caught.value)
        for part in (str(path), *broken.says):
            assert part in message
        assert caught.value.where is not None
        if broken.tensor is not None:
            assert caught.value.where.endswith(f", tensor '{broken.tensor}'")
        assert message.isprintable()
        assert len(message) < 1000 + len(str(path))


@pytest.mark.parametrize("broken", BROKEN_FILES, ids=lambda broken: broken.label)
def test_official_reader_agrees(broken: BrokenFile, tmp_path: Path) -> None:
    path = write(tmp_path, broken.content)
    if broken.official_accepts:
        with safe_open(path, "np"):
            return
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "np"):
        pass


@pytest.mark.parametrize("label", SOUND_FILES)
def test_sound_file_is_accepted(label: str, tmp_path: Path) -> None:
    content = SOUND_FILES[label]
    checkpoint = open_checkpoint(write(tmp_path, content))
    check_as_official(checkpoint, content)
    assert checkpoint.metadata == json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get(
        "__metadata__", {}
    )


arrays = st.builds(
    lambda dtype, shape, seed: (
        np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), np.uint8)
        .copy()
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from([dtype for dtype in DTYPE_NAMES.values() if dtype is not np.bool_]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 2**32),
) | st.lists(st.booleans(), max_size=9).map(lambda values: np.array(values, np.bool_))
names = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20).filter(lambda n: n != "__metadata__")
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.dictionaries(names, arrays, min_size=1, max_size=6),
    st.none() | st.dictionaries(texts, texts, max_size=3),
)
def test_what_safetensors_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    save_file(tensors, path, metadata)
    checkpoint = open_checkpoint(path)
    content = path.read_bytes()
    check_as_official(checkpoint, content)
    assert checkpoint.metadata == (metadata or {})
    for name, array in tensors.items():
        source = checkpoint.tensors[name]
        assert source.shape == array.shape
        assert DTYPE_NAMES[source.dtype.name] == array.dtype.type
        assert source.numel == array.size
        assert content[source.data_offset :][: source.nbytes] == array.tobytes()


def _mutate(rng: random.Random, content: bytes) -> bytes:
    """Change a few bytes of length or header; put in pieces of JSON, cut or double a range."""
    mutated = bytearray(content)
    header_end = 8 + int.from_bytes(content[:8], "little")
    pieces = (
        b"-0",
        b"1e1",
        b"0",
        b"18446744073709551616",
        b"null",
        b'"',
        b"}",
        b",",
        b"\\ud800",
        b" ",
        b"[",
        b"\xff",
    )
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(8, header_end) if rng.random() < 0.9 else rng.randrange(8)
        match rng.randrange(5):
            case 0:
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at : at + rng.choice((0, 1))] = rng.choice(pieces)
            case 2:
                del mutated[at : at + rng.randrange(1, 12)]
            case 3:
                mutated[at:at] = mutated[at : at + rng.randrange(1, 60)]
            case _:
                digits = [i for i in range(8, min(header_end, len(mutated))) if chr(mutated[i]).isdigit()]
                mutated[rng.choice(digits)] = rng.choice(b"0123456789")
        header_end = max(9, min(header_end, len(mutated)))
    if rng.random() < 0.7:  # keep the length true, so that the mutation is not only a wrong length
        mutated[:8] = struct.pack(
            "<Q", max(0, len(mutated) - (len(content) - 8 - int.from_bytes(content[:8], "little")))
        )
    return bytes(mutated)


def test_mutated_headers_never_get_past_the_official_reader(tmp_path: Path) -> None:
    rng = random.Random(20240617)
    tensors = {
        "layer-0.w": entry("BF16", [2, 3], 0, 12),
        "layer-0.b": entry("F32", [1], 12, 16),
        "z": entry("U8", [0], 16, 16),
        "s": entry("F64", [], 16, 24),
    }
    original = file_bytes({"__metadata__": {"format": "pt"}, **tensors}, bytes(range(24)))
    num_accepted = 0
    for number in range(NUM_MUTATIONS):
        content = _mutate(rng, original)
        path = write(tmp_path, content)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError:
            continue
        num_accepted += 1
        try:
            check_as_official(checkpoint, content)
        except (SafetensorError, AssertionError) as error:
            pytest.fail(f"mutation {number} was accepted, the official reader says {error}: {content!r}")
    assert 0 < num_accepted < NUM_MUTATIONS // 2


def test_minus_zero_is_no_count(tmp_path: Path) -> None:
    header = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}'
    with pytest.raises(CheckpointError, match="data_offsets is malformed"):
        open_checkpoint(write(tmp_path, file_bytes(header, ZEROS[:4])))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_only_regular_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file: got a"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "no\0where", "x" * 300, "model.safetensors/inside"])
def test_paths_that_cannot_be_opened(path: str, tmp_path: Path) -> None:
    write(tmp_path, file_bytes({"a": A}, ZEROS[:4]))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / path)
    assert caught.value.where is not None
    assert path.partition("\0")[0] in caught.value.where


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, file_bytes({"a": A}, ZEROS[:4]))

    def refuse(*_: object) -> int:  # chmod(0) would not stop root, who often runs the tests
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: permission denied; make it"):
        open_checkpoint(path)
