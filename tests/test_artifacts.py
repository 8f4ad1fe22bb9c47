"""The files around the weights: which of the base's are taken, the configuration, the record."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import metagpt_fast as mf
from metagpt_fast import artifacts
from metagpt_fast.artifacts import companion_files, merged_config, output_files, report_json, warnings_for
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, F32, F64
from metagpt_fast.errors import CheckpointError

TAKEN = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    "README.md",
    "modeling_custom.py",
    "LICENSE.py",
    "pytorch_model.bin",
    "model.safetensors.index.json.bak",
    "consolidated.00.pth",
    "trainer_state.json",
    "model.gguf",
    ".gitattributes",
    "onnx/config.json",
]


def make_weights(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, path)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_weights(folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return folder


def names(folder):
    return [path.relative_to(folder).as_posix() for path in companion_files(open_checkpoint(folder))]


def test_only_known_files_are_taken(base):
    for name in TAKEN + LEFT:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").mkdir()  # a folder of that name is no file
    assert names(base) == [name for name in TAKEN if name != "tokenizer_config.json"]
    assert warnings_for(open_checkpoint(base)) == ()


def test_a_bare_file_has_no_companions(base):
    checkpoint = open_checkpoint(base / "model.safetensors")
    assert companion_files(checkpoint) == []
    assert output_files(checkpoint, None) == []
    assert warnings_for(checkpoint) == ()


def test_a_hugging_face_cache_is_followed(tmp_path):
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    make_weights(blobs / "111")
    (blobs / "222").write_text('{"dtype": "float32"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/111")
    (snapshot / "config.json").symlink_to("../../blobs/222")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/not-downloaded")
    assert names(snapshot) == ["config.json"]
    assert warnings_for(open_checkpoint(snapshot)) == ()


def test_links_to_private_files_are_not_followed(tmp_path, base):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (base / "tokenizer.json").symlink_to(secret)
    (base / "vocab.json").symlink_to("config.json")
    assert names(base) == ["config.json", "vocab.json"]
    (warning,) = warnings_for(open_checkpoint(base))
    assert "tokenizer.json" in warning
    assert "id_rsa" in warning


def test_a_configuration_that_is_not_copied_is_not_read(tmp_path, base):
    secret = tmp_path / "secret"
    secret.write_text("no JSON")
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(secret)
    checkpoint = open_checkpoint(base)
    assert output_files(checkpoint, BF16) == []
    (warning,) = warnings_for(checkpoint)
    assert "config.json: it is a link" in warning


def test_unreadable_files_are_found_before_the_work(base, monkeypatch):
    (base / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"base/tokenizer.json: cannot be read: permission denied"):
        output_files(open_checkpoint(base), None)


def test_large_files_are_not_copied(base):
    with (base / "tokenizer.json").open("wb") as file:
        os.truncate(file.fileno(), 256 * 2**20)
    assert "tokenizer.json" in names(base)
    with (base / "tokenizer.json").open("r+b") as file:
        os.truncate(file.fileno(), 256 * 2**20 + 1)
    assert "tokenizer.json" not in names(base)
    (warning,) = warnings_for(open_checkpoint(base))
    assert "268 MB" in warning


def test_pipes_are_left_alone(base):
    os.mkfifo(base / "tokenizer.json")
    assert names(base) == ["config.json"]


def test_output_files(base):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "a.jinja").write_text("x")
    (base / "vocab.txt").write_text("x")
    assert output_files(open_checkpoint(base), BF16) == [
        ("additional_chat_templates/a.jinja", base / "additional_chat_templates" / "a.jinja"),
        ("config.json", b'{\n  "dtype": "bfloat16"\n}\n'),
        ("vocab.txt", base / "vocab.txt"),
    ]


def test_custom_code_is_announced(base):
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    (base / "modeling_x.py").write_text("raise SystemExit")
    (warning,) = warnings_for(open_checkpoint(base))
    assert "auto_map" in warning
    assert names(base) == ["config.json"]


def test_custom_code_is_copied_on_request(tmp_path, base):
    """And not run: the file would say so."""
    code = f"open({str(tmp_path / 'executed')!r}, 'w')"
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    for name in ("modeling_x.py", "config.py", "LICENSE.py"):
        (base / name).write_text(code)
    (base / "sub").mkdir()
    (base / "sub" / "more.py").write_text(code)
    (tmp_path / "private.py").write_text("secret")
    (base / "link.py").symlink_to(tmp_path / "private.py")
    make_weights(tmp_path / "model" / "model.safetensors")
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model" / "model.safetensors")

    plain = mf.merge(base, [tmp_path / "model"], tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert any("--copy-code" in warning for warning in plain.warnings)
    report = mf.merge(base, [tmp_path / "model"], tmp_path / "out", copy_code=True)
    copied = sorted(path.name for path in (tmp_path / "out").glob("**/*.py"))
    assert copied == ["LICENSE.py", "config.py", "modeling_x.py"]
    assert (tmp_path / "out" / "config.py").read_text() == code
    warnings = " ".join(report.warnings)
    assert "LICENSE.py, config.py, modeling_x.py copied; who loads" in warnings
    assert "link to a place outside the checkpoint" in warnings
    assert not (tmp_path / "executed").exists()
    command = ["merge", str(base), str(tmp_path / "model"), "-o", str(tmp_path / "again"), "--quiet", "--copy-code"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert (tmp_path / "again" / "config.py").exists()


def test_a_missing_configuration_is_announced(base):
    (base / "config.json").unlink()
    (warning,) = warnings_for(open_checkpoint(base))
    assert "no config.json" in warning


@pytest.mark.parametrize(
    "config, dtype, expected",
    [
        ({"a": 1}, F32, {"a": 1, "torch_dtype": "float32"}),
        ({"torch_dtype": "float16"}, BF16, {"torch_dtype": "bfloat16"}),
        ({"dtype": None, "a": 2}, F64, {"dtype": "float64", "a": 2}),
        ({"dtype": "x", "torch_dtype": "y"}, BF16, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {
                "text_config": {"dtype": "float16", "deep_config": {"torch_dtype": "float16"}},
                "vision_config": {"a": 1},
                "quantization_config": {"dtype": "int8"},
                "rope_scaling": {"dtype": "kept"},
            },
            BF16,
            {
                "text_config": {"dtype": "bfloat16", "deep_config": {"torch_dtype": "bfloat16"}},
                "vision_config": {"a": 1},
                "quantization_config": {"dtype": "int8"},
                "rope_scaling": {"dtype": "kept"},
                "torch_dtype": "bfloat16",
            },
        ),
    ],
)
def test_merged_config(tmp_path, config, dtype, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert json.loads(merged_config(path, dtype)) == expected


def test_the_configuration_is_unchanged_without_a_dtype(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":1,\r\n "dtype" : "float16", "name": "gr\xc3\xb6\xc3\x9fe", "x": Infinity}')
    assert merged_config(path, None) == path.read_bytes()
    assert json.loads(merged_config(path, F32))["x"] == float("inf")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe\xfd", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_broken_configurations(base, content, dtype):
    (base / "config.json").write_bytes(content)
    checkpoint = open_checkpoint(base)
    for function in (lambda: output_files(checkpoint, dtype), lambda: warnings_for(checkpoint)):
        with pytest.raises(CheckpointError) as caught:
            function()
        assert caught.value.where == str(base / "config.json")


def test_a_deeply_nested_configuration_is_refused(tmp_path):
    """Python 3.13 parses more levels than it can write."""
    path = tmp_path / "config.json"
    path.write_text('{"a_config":' * 3000 + "1" + "}" * 3000)
    with pytest.raises(CheckpointError, match="recursion"):
        merged_config(path, BF16)


def test_a_missing_configuration_cannot_be_merged(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        merged_config(tmp_path / "config.json", None)


def test_report_json():
    values = {"cosines": [[1.0, float("nan")], [float("inf"), 0.5]], "name": "größe", "norms": (1.0, 2)}
    text = report_json(SimpleNamespace(to_dict=lambda: values), {"shards": []})
    assert text.endswith("}\n")
    expected = {"cosines": [[1.0, None], [None, 0.5]], "name": "größe", "norms": [1.0, 2], "output": {"shards": []}}
    assert json.loads(text) == expected


def test_the_card_is_exported():
    assert artifacts.model_card.__module__ == "metagpt_fast.model_card"
