"""A checkpoint on disk, as the merge sees it: which file holds which tensor, and at what offset.

``open_checkpoint`` reads headers only. It takes what Hugging Face libraries write (one safetensors file, or
shards with an index, under the stem of transformers or of diffusers), a bare ``.safetensors`` file, and with
the help of torch what ``torch.save`` wrote (pickle_file.py) where there is no safetensors file.
Everything is validated before it is returned, so whoever comes next may map the files and trust the offsets.
"""

from __future__ import annotations

import gc
import hashlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import CheckpointError
from .pickle_file import PICKLE_SUFFIXES, read_pickle_header
from .safetensors_file import (
    CONVERT_PICKLE,
    MAX_HEADER_NBYTES,
    ShardFile,
    ShardHeader,
    TensorSource,
    check_tensor_name,
    read_header,
)
from .untrusted import DOWNLOAD_AGAIN, brief, open_regular, parse_json_object, read_at, unreadable

__all__ = ["Checkpoint", "ShardFile", "TensorSource", "open_checkpoint"]

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_ANY_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")  # diffusers' variants: .index.fp16.json
_STEMS = ("model", "diffusion_pytorch_model")  # transformers, diffusers
# Looked for by name only: a training leaves more pickle files beside the weights.
_PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_PICKLE_INDEX_SUFFIX = ".bin.index.json"
_ONE_OF_MANY = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MAX_NAME_NBYTES = 255  # of a file, on every common file system
_PAGE_NBYTES = 4096
_NUM_PAGES = 16


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: the place of every tensor, no tensor data.

    Attributes:
        path: the folder or file, as the user gave it.
        label: short name for tables and messages; not necessarily unique.
        shards: the files, in order of their names.
        tensors: every tensor by name, in file order: shard by shard, offset by offset.
        is_bare_file: whether ``path`` is a file and not a folder.
        metadata: ``__metadata__`` of the first shard.
    """

    path: Path
    label: str
    shards: tuple[ShardFile, ...]
    tensors: dict[str, TensorSource]
    is_bare_file: bool
    metadata: dict[str, str]

    def fingerprint(self) -> list[dict[str, Any]]:
        """Return what identifies the files: per shard name, nbytes, mtime_ns, header_sha256, sample_sha256.

        The sample is 16 pages of 4 KiB, evenly spread from the first byte to the last and always at the same
        places: 64 KiB for a file of any size. It tells checkpoints apart; it is no proof against tampering.

        Raises:
            CheckpointError: a file has changed since it was opened, or cannot be read any more.
        """
        return [_fingerprint(shard) for shard in self.shards]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or a bare safetensors or PyTorch file. Reads headers only.

    In a folder the choice is the one transformers makes: ``model.safetensors``, else the shards that
    ``model.safetensors.index.json`` names; else the same for the stem of diffusers, else the only index, else
    the only ``.safetensors`` file; else ``pytorch_model.bin`` or the shards of its index.

    Raises:
        CheckpointError: there is no such checkpoint, or its files are broken or contradict each other.
    """
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise _missing(path, error) from error
    weight_map: dict[str, str] | None = None
    if is_folder:
        chosen = _choose_file(path)
        files = [chosen]
        if _is_index(chosen.name):
            weight_map = _read_index(chosen)
            files = [path / name for name in sorted(set(weight_map.values()))]
            _check_present(path, files)
    else:
        _check_bare_name(path)
        files = [path]

    with _collector_paused():
        headers = [_read_header(file) for file in files]
        tensors = _all_tensors(headers)
        if weight_map is not None:
            _check_index(path, weight_map, tensors)
    if not tensors:
        where, expected = files[0], "at least one"
        raise CheckpointError("checkpoint holds no tensors", where=where, got="an empty header", expected=expected)
    shards = tuple(header.file for header in headers)
    return Checkpoint(path, _label(path), shards, tensors, not is_folder, headers[0].metadata)


def _read_header(path: Path) -> ShardHeader:
    return (read_pickle_header if path.name.endswith(PICKLE_SUFFIXES) else read_header)(path)


def _is_index(name: str) -> bool:
    return _ANY_INDEX.search(name) is not None or name.endswith(_PICKLE_INDEX_SUFFIX)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: a header makes many objects and no cycles.

    Left running, it takes 0.4 of the 0.7 s that a checkpoint of 50,000 tensors needs.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _all_tensors(headers: Sequence[ShardHeader]) -> dict[str, TensorSource]:
    tensors: dict[str, TensorSource] = {}
    for header in headers:
        for source in header.tensors:
            other = tensors.setdefault(source.name, source)
            if other is not source:
                raise CheckpointError(
                    "tensor is in two shards",
                    where=f"{source.path}, tensor {brief(source.name)}",
                    got=f"also in {other.path.name}",
                    expected="each tensor once",
                    hint=DOWNLOAD_AGAIN,
                )
    return tensors


def _choose_file(folder: Path) -> Path:
    """Return the folder's one safetensors file, or the index of its shards."""
    try:
        # Hidden files are none of ours: macOS leaves "._model.safetensors" beside files on foreign disks.
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
    for stem in _STEMS:
        for name in (stem + _SUFFIX, stem + _INDEX_SUFFIX):
            if name in names:
                return folder / name
    indexes = [name for name in names if _ANY_INDEX.search(name)]
    if len(indexes) == 1:
        return folder / indexes[0]
    weights = [name for name in names if name.endswith(_SUFFIX) and not name.startswith("adapter_model")]
    if not weights:
        for name in (each for pickle in _PICKLES for each in (pickle, pickle + ".index.json")):
            if name in names:
                return folder / name
        raise _no_weights(folder, names)
    one_of_many = _ONE_OF_MANY.search(weights[0])
    if len(indexes) > 1:
        what, got, hint = "more than one index", _listing(indexes), "leave one of them in the folder"
    elif one_of_many and int(one_of_many[1]) > 1:
        what, got = "shards without their index", _listing(weights)
        hint = "download the .safetensors.index.json file too"
    elif len(weights) > 1:
        what, got = "several safetensors files and no index", _listing(weights)
        hint = "give the path of one of them, or add the index of the shards"
    else:
        return folder / weights[0]
    raise CheckpointError(what, where=folder, got=got, expected="one file, or shards with one index", hint=hint)


def _no_weights(folder: Path, names: Sequence[str]) -> CheckpointError:
    """Return the error for a folder without safetensors weights: it says what is there instead."""
    if any(name.startswith(("adapter_model", "adapter_config")) for name in names):
        hint = "merge the adapter into its base model first (peft: merge_and_unload, then save_pretrained)"
        return CheckpointError("is a LoRA adapter, not a model", where=folder, expected="full weights", hint=hint)
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        hint = f"give the path of the one that holds the weights, or {CONVERT_PICKLE}"
        expected = f"safetensors files, or {_PICKLES[0]}"
        return CheckpointError(
            "only other pickle files", where=folder, got=_listing(pickles), expected=expected, hint=hint
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        hint = "merge the original safetensors checkpoint, then convert the result"
        return CheckpointError("only GGUF files", where=folder, got=_listing(gguf), expected="safetensors", hint=hint)
    # A diffusers pipeline, or a Hugging Face cache entry, given by the folder above the one that is meant.
    inside = {file.parent for glob in ("*/*", "snapshots/*/*") for file in folder.glob(glob + _SUFFIX)}
    hint = "give the path of the folder that holds the weights"
    if inside:
        hint = "give the path of one model's folder: " + _listing(sorted(str(path) for path in inside))
    got = _listing(names) if names else "an empty folder"
    return CheckpointError(
        "no safetensors files", where=folder, got=got, expected="model.safetensors or an index", hint=hint
    )


def _missing(path: Path, error: OSError | ValueError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) and not path.is_symlink() and _HUB_ID.fullmatch(str(path)):
        hint = f"check the path; for a model on the Hugging Face hub: hf download {path} --local-dir FOLDER"
        return CheckpointError("does not exist", where=path, hint=hint)
    return unreadable(path, error)


def _check_bare_name(path: Path) -> None:
    if _is_index(path.name):
        hint = "give the folder that holds it"
        raise CheckpointError("is the index of a checkpoint", where=path, expected="a folder or file", hint=hint)
    if path.name in {"adapter_model.safetensors", "adapter_model.bin"}:
        raise _no_weights(path, [path.name])


def _read_index(path: Path) -> dict[str, str]:
    """Return the weight map, {tensor name: shard name}, with every shard name safe to join to the folder."""
    with open_regular(path) as (fd, info):
        if info.st_size > MAX_HEADER_NBYTES:
            expected = f"at most {MAX_HEADER_NBYTES}"
            raise CheckpointError("index is too large", where=path, got=f"{info.st_size} bytes", expected=expected)
        raw = read_at(fd, info.st_size, 0)
    if raw.startswith(b"version https://git-lfs"):
        hint = "it was not downloaded: run `git lfs pull`"
        raise CheckpointError("is not an index", where=path, got="a Git LFS pointer", expected="JSON", hint=hint)
    index = parse_json_object(raw, path, "index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "index has no usable weight_map",
            where=path,
            got=brief(weight_map),
            expected="shard file names by tensor name",
            hint=DOWNLOAD_AGAIN,
        )
    safe: set[str] = set()
    for tensor, shard in weight_map.items():
        check_tensor_name(tensor, path)
        if not isinstance(shard, str):
            where = f"{path}, tensor {brief(tensor)}"
            raise CheckpointError("shard is not a file name", where=where, got=type(shard).__name__, expected="str")
        if shard not in safe:
            if not is_plain_name(shard):
                raise CheckpointError(
                    "shard lies outside the folder, or has no usable name",
                    where=f"{path}, tensor {brief(tensor)}",
                    got=brief(shard),
                    expected="the plain name of a file in the same folder",
                    hint="do not trust this checkpoint",
                )
            safe.add(shard)
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is one path component on every system. What it names may still be a symlink."""
    is_one_component = PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    is_usable = name.isprintable() and len(name.encode()) <= _MAX_NAME_NBYTES
    return is_one_component and name not in {"", ".", ".."} and is_usable


def _check_present(folder: Path, files: Sequence[Path]) -> None:
    missing = []
    for file in files:
        try:
            file.lstat()
        except FileNotFoundError:
            missing.append(file.name)
        except OSError as error:
            raise unreadable(file, error) from error
    if missing:
        raise CheckpointError(
            "the index names shards that are not there",
            where=folder,
            got=f"{len(files) - len(missing)} of {len(files)}, without {_listing(missing)}",
            expected="all of them",
            hint="complete the download",
        )


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorSource]) -> None:
    """Check that the index lists every tensor, no other, and each in the shard that holds it."""
    owners = {name: source.path.name for name, source in tensors.items()}
    if weight_map == owners:
        return
    name = min(name for name, _ in weight_map.items() ^ owners.items())
    promised, actual = weight_map.get(name), owners.get(name)
    if promised is None:
        what = "shard holds a tensor that the index does not list"
    elif actual is None:
        what = "shard lacks a tensor that the index says it holds"
    else:
        what = "tensor is in another shard than the index says"
    raise CheckpointError(
        what,
        where=f"{folder / (promised or actual or '')}, tensor {brief(name)}",
        got=f"it in {actual}" if actual else "no such tensor",
        expected=f"it in {promised}" if promised else "no such tensor",
        hint=f"index and shards are not of one download; {DOWNLOAD_AGAIN}",
    )


def _label(path: Path) -> str:
    """Return a short name: the folder's or file's, or the model's for a Hugging Face cache snapshot."""
    full = path if path.name not in {"", ".."} else path.resolve()
    if full.parent.name == "snapshots" and full.parent.parent.name.startswith("models--"):
        return full.parent.parent.name.split("--")[-1]
    return full.name or str(full)


def _listing(names: Iterable[str], limit: int = 6) -> str:
    names = [ascii(name) if not name.isprintable() else name for name in names]
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _fingerprint(shard: ShardFile) -> dict[str, Any]:
    sample = hashlib.sha256()
    with open_regular(shard.path) as (fd, info):
        if (info.st_size, info.st_mtime_ns) != (shard.nbytes, shard.mtime_ns):
            raise CheckpointError(
                "file has changed since it was opened",
                where=shard.path,
                got=f"{info.st_size} bytes",
                expected=f"{shard.nbytes} bytes, unmodified",
                hint="run the command again",
            )
        last = max(0, shard.nbytes - _PAGE_NBYTES)
        for page in range(_NUM_PAGES):
            sample.update(read_at(fd, _PAGE_NBYTES, last * page // (_NUM_PAGES - 1)))
    return {
        "name": shard.path.name,
        "nbytes": shard.nbytes,
        "mtime_ns": shard.mtime_ns,
        "header_sha256": shard.header_sha256,
        "sample_sha256": sample.hexdigest(),
    }
