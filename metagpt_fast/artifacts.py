"""The files around the weights of an output: the base's configuration and tokenizer, the card, the record."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dtypes import DType
from .errors import CheckpointError
from .model_card import model_card
from .quantities import format_nbytes
from .untrusted import DOWNLOAD_AGAIN, unreadable

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .report import MergeReport

__all__ = ["companion_files", "merged_config", "model_card", "output_files", "report_json", "warnings_for"]

# An allow list: what is not known to be needed stays behind, weights above all, and code (*.py) if it is not asked for.
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",  # Whisper
    "tekken.json",  # Mistral
    "*.model",  # SentencePiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "tokenizer.model.v*",  # Mistral
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_MAX_FILE_NBYTES = 256 * 2**20
_NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DTYPE_KEYS = ("torch_dtype", "dtype")  # transformers 5 writes the second


def companion_files(base: Checkpoint, *, copy_code: bool = False) -> list[Path]:
    """Return the base's files that belong into the output, sorted by name; none for a bare file.

    With ``copy_code`` its ``*.py`` files are among them, which nothing here runs.

    Left out are files that are not on the allow list, files larger than 256 MiB, and links to places outside
    the checkpoint: a stranger's checkpoint may link to a private file of the user, and outputs get published.
    """
    return [path for path, problem in _candidates(base, copy_code=copy_code) if problem is None]


def output_files(
    base: Checkpoint, out_dtype: DType | None, layers: Sequence[int] | None = None, *, copy_code: bool = False
) -> list[tuple[str, bytes | Path]]:
    """Return name and content, as ``CheckpointWriter.add_file`` takes them, of each companion file.

    ``config.json`` is adapted; see :func:`merged_config`.

    Raises:
        CheckpointError: ``config.json`` is broken, or a file may not be read.
    """
    files: list[tuple[str, bytes | Path]] = []
    for path in companion_files(base, copy_code=copy_code):
        name = path.relative_to(base.path).as_posix()
        if not os.access(path, os.R_OK):
            raise unreadable(path, PermissionError())
        files.append((name, merged_config(path, out_dtype, layers) if name == "config.json" else path))
    return files


def warnings_for(base: Checkpoint, *, copy_code: bool = False) -> tuple[str, ...]:
    """Return what the user should know about the files that the output does not get from the base.

    Raises:
        CheckpointError: ``config.json`` is broken.
    """
    if base.is_bare_file:
        return ()
    warnings = []
    config = base.path / "config.json"
    candidates = dict(_candidates(base, copy_code=copy_code))
    if config not in candidates:
        warnings.append(f"{base.path}: no config.json, so the output has none and transformers cannot load it")
    elif candidates[config] is None and not copy_code and "auto_map" in _parse_config(config)[1]:
        warnings.append(
            f"{config}: the model has code of its own (auto_map), which was not copied; to load the output, "
            "read the base's *.py files and copy them into it, or merge with --copy-code"
        )
    if copied := [path.name for path in candidates if path.suffix == ".py" and candidates[path] is None]:
        warnings.append(
            f"{base.path}: {', '.join(copied)} copied; who loads the output with trust_remote_code runs them"
        )
    warnings += [f"{path}: {problem}, so it was not copied" for path, problem in candidates.items() if problem]
    return tuple(warnings)


def merged_config(path: Path, out_dtype: DType | None, layers: Sequence[int] | None = None) -> bytes:
    """Return the content of the output's ``config.json``; the file's own, if nothing changes.

    Args:
        path: the base's ``config.json``.
        out_dtype: the dtype of all merged tensors; None if they keep the base's.
        layers: which of the base's layers each layer of the output is; None if the output has the same layers.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    content, config = _parse_config(path)
    if out_dtype is None and layers is None:
        return content
    try:
        if out_dtype is not None:
            if not any(key in config for key in _DTYPE_KEYS):
                config["torch_dtype"] = None
            _replace_dtype(config, out_dtype)
        if layers is not None:
            _replace_layers(config, layers)
        return (json.dumps(config, indent=2) + "\n").encode()
    except RecursionError as error:
        raise CheckpointError("configuration has too many levels", where=path, got=error) from error


def report_json(report: MergeReport, output: Mapping[str, Any]) -> str:
    """Return the content of ``metagpt_fast.json``; NaN and infinities become null, as JSON has none.

    Args:
        report: the merge.
        output: what its files are, for ``verify``.
    """
    return json.dumps(_plain({**report.to_dict(), "output": output}), indent=2, allow_nan=False) + "\n"


def _candidates(base: Checkpoint, *, copy_code: bool) -> Iterator[tuple[Path, str | None]]:
    """Yield the base's files on the allow list, each with the reason not to copy it, or None."""
    if base.is_bare_file:
        return
    # In a Hugging Face cache every file is a link, to the folder that the weights' links lead to as well.
    homes = {shard.path.resolve().parent for shard in base.shards}
    root = base.path.resolve()
    patterns = (*_PATTERNS, "*.py") if copy_code else _PATTERNS
    for path in sorted({p for pattern in patterns for p in base.path.glob(pattern)}):
        if (copy_code or path.suffix != ".py") and path.is_file():  # LICENSE.py would match, too
            real = path.resolve()
            nbytes = path.stat().st_size
            if root not in real.parents and real.parent not in homes:
                yield path, f"it is a link to a place outside the checkpoint ({real})"
            elif nbytes > _MAX_FILE_NBYTES:
                yield path, f"it has {format_nbytes(nbytes)}, more than {format_nbytes(_MAX_FILE_NBYTES)}"
            else:
                yield path, None


def _parse_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        # Not strict JSON: transformers writes Infinity (time_step_limit of Mamba 2), and reads it.
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("configuration is not valid JSON", where=path, got=error, hint=DOWNLOAD_AGAIN) from error
    if not isinstance(config, dict):
        got = f"a {type(config).__name__}"
        raise CheckpointError("configuration is not a JSON object", where=path, got=got, expected="an object")
    return content, config


def _replace_dtype(config: dict[str, Any], out_dtype: DType) -> None:
    """Also in the configurations of parts (text_config, vision_config), but not in quantization_config."""
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            config[key] = out_dtype.torch_name
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            _replace_dtype(value, out_dtype)


def _replace_layers(config: dict[str, Any], layers: Sequence[int]) -> None:
    """Set the number of layers, and take lists that have an entry per layer (layer_types) apart accordingly."""
    for name in _NUM_LAYERS_KEYS:
        num_layers = config.get(name)
        if not isinstance(num_layers, int):
            continue
        for key, value in config.items():
            if isinstance(value, list) and len(value) == num_layers and num_layers > 1:
                config[key] = [value[min(layer, num_layers - 1)] for layer in layers]
        config[name] = len(layers)
    for key, value in config.items():
        if key == "text_config" and isinstance(value, dict):
            _replace_layers(value, layers)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
