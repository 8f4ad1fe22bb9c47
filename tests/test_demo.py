"""The family generator and the demonstration made with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.dtypes import BF16, F16, F32
from metagpt_fast.errors import OutputError, RecipeError
from metagpt_fast.family import (
    NAMES,
    PRESETS,
    TASK_VECTOR_SIGMAS,
    LlamaShape,
    _Scratch,
    _to_bf16,
    family_nbytes,
    make_family,
)
from metagpt_fast.reference import layer_gram, round_from_float32, to_float64

TINY = PRESETS["tiny"]


def make_tiny(folder, **changes):
    settings = {"shape": TINY.shape, "max_shard_nbytes": TINY.max_shard_nbytes, "seed": 0, **changes}
    return make_family(folder, **settings)


def values(path, name):
    source = open_checkpoint(path).tensors[name]
    raw = np.fromfile(source.path, np.uint8, source.nbytes, offset=source.data_offset)
    return to_float64(raw, source.dtype)


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_a_family_is_sharded_checkpoints_with_the_task_vectors_asked_for(tmp_path):
    family = make_tiny(tmp_path)
    assert [path.name for path in (family.base, *family.models)] == ["base", *NAMES]
    checkpoints = [open_checkpoint(path) for path in (family.base, *family.models)]
    assert len(checkpoints[0].shards) == family.num_shards == 2
    gram = np.zeros((4, 4))
    for name in checkpoints[0].tensors:
        operands = []
        for checkpoint in checkpoints:
            source = checkpoint.tensors[name]
            raw = np.fromfile(source.path, np.uint8, source.nbytes, offset=source.data_offset)
            operands.append((raw, source.dtype))
        gram += layer_gram([operands], has_base=True)[0]
    sigmas = np.sqrt(np.diagonal(gram)[1:] / family.num_parameters)
    np.testing.assert_allclose(sigmas, TASK_VECTOR_SIGMAS, rtol=0.05)
    cosines = gram[1:, 1:] / np.sqrt(np.outer(np.diagonal(gram)[1:], np.diagonal(gram)[1:]))
    off_diagonal = cosines[~np.eye(3, dtype=bool)]
    assert np.all((off_diagonal > 0.03) & (off_diagonal < 0.1))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    make_tiny(tmp_path / "a")
    make_tiny(tmp_path / "b")
    make_tiny(tmp_path / "c", seed=1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_and_tied_embeddings(tmp_path, dtype, tied):
    shape = LlamaShape(16, 32, 1, 4, 2, 64, tie_word_embeddings=tied)
    seen = []
    family = make_family(
        tmp_path,
        shape=shape,
        names=["one"],
        task_vector_sigmas=[1e-2],
        max_shard_nbytes=10**9,
        seed=3,
        dtype=dtype,
        advance=seen.append,
    )
    checkpoint = open_checkpoint(family.base)
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    assert {source.dtype for source in checkpoint.tensors.values()} == {dtype}
    assert sum(seen) == family_nbytes(shape, 1, dtype)
    name = "model.embed_tokens.weight"
    assert 0.015 < values(family.base, name).std() < 0.025
    change = values(family.models[0], name) - values(family.base, name)
    assert 0.008 < change.std() < 0.012


def test_transformers_loads_the_family(tmp_path):
    transformers = pytest.importorskip("transformers")
    family = make_tiny(tmp_path)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(family.models[0], output_loading_info=True)
    assert not any(loading.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == family.num_parameters


def test_rounding_to_bf16_is_the_references():
    numbers = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    bits = np.arange(0x3F800000, 0x3F800000 + 3 * 0x8000, 0x2000, dtype=np.uint32)  # ties among them
    numbers = np.concatenate([numbers, bits.view(np.float32), -bits.view(np.float32), np.zeros(2, np.float32)])
    expected = round_from_float32(numbers, BF16)
    np.testing.assert_array_equal(_to_bf16(numbers.copy(), _Scratch(BF16)), expected)


def test_heads_must_divide():
    with pytest.raises(RecipeError, match="heads do not divide"):
        LlamaShape(64, 128, 2, 5, 2, 256)


def test_an_existing_model_is_not_replaced_and_nothing_is_left(tmp_path):
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "file").write_text("mine")
    with pytest.raises(OutputError):
        make_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["math"]


def test_the_demo_makes_merges_checks_and_cleans_up(tmp_path, monkeypatch, capsys):
    from metagpt_fast.demo import run_demo

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_demo(size="tiny", quiet=True)
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    for expected in (
        "random weights",
        "λ",
        "against the formula in float64",
        "safetensors opens",
        "$ metagpt-fast",
    ):
        assert expected in text


def test_the_demo_keeps_what_was_asked_for(tmp_path, capsys):
    from metagpt_fast.demo import run_demo

    folder = tmp_path / "my family"
    run_demo(str(folder), size="tiny", quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "chat", "code", "math", "merged"]
    assert f"cd '{folder}'" in capsys.readouterr().out
    with pytest.raises(OutputError, match="not empty"):
        run_demo(str(folder), size="tiny", quiet=True)


def test_the_check_finds_a_wrong_element(tmp_path):
    from metagpt_fast.demo import check_merge
    from metagpt_fast.errors import DataError
    from metagpt_fast.merging import merge

    family = make_tiny(tmp_path)
    report = merge(family.base, family.models, tmp_path / "merged")
    check = check_merge(family, report)
    assert check.num_equal > 0.99 * check.numel
    source = open_checkpoint(tmp_path / "merged").tensors["model.norm.weight"]
    with source.path.open("r+b") as file:
        file.seek(source.data_offset)
        file.write(b"\x00\x40")  # 2.0 in bf16
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        check_merge(family, report)
