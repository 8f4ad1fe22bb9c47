"""The record of a merge, ``metagpt_fast.json``, read back: what was merged, how, and the checksums of its files.

The record lies in an output that may come from a stranger: it is checked like the checkpoint itself. What it names is
read, never run, and the paths in it are opened for reading only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import is_plain_name
from .errors import CheckpointError
from .output_target import is_file_target, side_file
from .untrusted import brief, open_regular, parse_json_object, read_at

FILE_NAME = "metagpt_fast.json"
MAX_NBYTES = 1 << 28
_CRC32C = re.compile("[0-9a-f]{8}")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of a file: its size in bytes, and the CRC32C of its data."""

    name: str
    nbytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One file of the output: a header and the data of its tensors, in order; their CRC32C if they were recorded."""

    name: str
    nbytes: int | None = None
    crc32c: int | None = None
    tensors: tuple[TensorRecord, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of the header, and of each tensor."""
        sizes = [tensor.nbytes for tensor in self.tensors]
        return [(self.nbytes or 0) - sum(sizes), *sizes]


@dataclass(frozen=True)
class Record:
    """What a merge has said about itself.

    Attributes:
        path: the record's file.
        out: the output's path, as given to the merge.
        base: the base's path, as given.
        models: the models' paths, as given.
        method: the method's name.
        parameters: its parameters, by name; of the first tensor, if there is a recipe.
        granularity: over what coefficients were solved.
        exclude: the pattern of tensors taken from the base, or None.
        out_dtype: of merged tensors: ``keep``, ``bf16``, ...
        recipe: the recipe's text, or None.
        is_of_tool: whether another tool had made the merge's plan (docs/integrating.md).
        backend: what computed the merge.
        scopes: what the rows of ``coefficients`` are for, S of them.
        coefficients: S rows of M numbers; None where a number is not finite.
        fingerprints: per path, as given, what identifies each of its files.
        shards: the files of the output.
    """

    path: Path
    out: str
    base: str
    models: tuple[str, ...]
    method: str
    parameters: Mapping[str, Any]
    granularity: str
    exclude: str | None
    out_dtype: str
    recipe: str | None
    is_of_tool: bool
    backend: str
    scopes: tuple[str, ...]
    coefficients: tuple[tuple[float | None, ...], ...]
    fingerprints: Mapping[str, list[dict[str, Any]]]
    shards: tuple[ShardRecord, ...]

    @property
    def has_checksums(self) -> bool:
        """Return whether the checksum of every file was recorded."""
        return all(shard.crc32c is not None for shard in self.shards)


def record_path(out: Path) -> Path:
    """Return where the record of an output is: in its folder, or beside its one file."""
    return side_file(out, FILE_NAME) if is_file_target(out) and not out.is_dir() else out / FILE_NAME


def read_record(out: Path) -> Record:
    """Read the record of the output ``out``, a folder or a bare file.

    Raises:
        CheckpointError: there is none, or it is not one that a merge has written.
    """
    path = record_path(out)
    if not path.exists():
        raise CheckpointError(
            "there is no record of a merge",
            where=out,
            got=f"no {path.name}",
            expected="an output of metagpt-fast merge or run, with its metagpt_fast.json",
        )
    with open_regular(path) as (fd, info):
        if info.st_size > MAX_NBYTES:
            raise CheckpointError("record is too large", where=path, expected=f"at most {MAX_NBYTES} bytes")
        raw = read_at(fd, MAX_NBYTES, 0)
    content = parse_json_object(raw, path, "record")
    try:
        return _record(path, content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"the record is broken ({reason})", where=path) from error


def _record(path: Path, content: Mapping[str, Any]) -> Record:
    coefficients = _list(content, "coefficients", _numbers)
    scopes = _list(content, "scopes", _text)
    if len(scopes) != len(coefficients):
        raise ValueError(f"{len(scopes)} scopes with coefficients of {len(coefficients)}")
    return Record(
        path=path,
        out=_text(content["out"]),
        base=_text(content["base"]),
        models=_list(content, "models", _text),
        method=_text(content["method"]),
        parameters=_object(content["parameters"]),
        granularity=_text(content["granularity"]),
        exclude=_optional_text(content["exclude"]),
        out_dtype=_text(content["out_dtype"]),
        recipe=_optional_text(content.get("recipe")),
        is_of_tool=content.get("tool") is not None,
        backend=_text(content["backend"]),
        scopes=scopes,
        coefficients=coefficients,
        fingerprints={
            name: [_object(each) for each in _array(files)] for name, files in _object(content["fingerprints"]).items()
        },
        shards=_shards(content),
    )


def _shards(content: Mapping[str, Any]) -> tuple[ShardRecord, ...]:
    """Return the files with their checksums, or by name alone from a version that had none."""
    output = content.get("output")
    if output is None:
        shards = [ShardRecord(_file_name(name)) for name in _array(content["shards"])]
    else:
        shards = []
        for each in _array(_object(output)["shards"]):
            tensors = tuple(
                TensorRecord(_text(tensor["name"]), _nbytes(tensor), _crc32c(tensor))
                for tensor in map(_object, _array(_object(each)["tensors"]))
            )
            shard = ShardRecord(_file_name(each["name"]), _nbytes(each), _crc32c(each), tensors)
            if shard.sizes[0] < 0:
                raise ValueError(f"{brief(shard.name)}: the tensors are larger than the file")
            shards.append(shard)
    if not shards or len({shard.name for shard in shards}) != len(shards):
        raise ValueError("shards: expected at least one, each once")
    return tuple(shards)


def _nbytes(entry: Mapping[str, Any]) -> int:
    nbytes = entry["nbytes"]
    if type(nbytes) is not int or not 0 <= nbytes < 1 << 63:
        raise ValueError(f"nbytes: got {brief(nbytes)}")
    return nbytes


def _crc32c(entry: Mapping[str, Any]) -> int:
    crc = _text(entry["crc32c"])
    if _CRC32C.fullmatch(crc) is None:
        raise ValueError(f"crc32c: got {brief(crc)}, expected 8 hexadecimal digits")
    return int(crc, 16)


def _file_name(value: object) -> str:
    name = _text(value)
    if not is_plain_name(name):
        raise ValueError(f"shards: {brief(name)} is not the plain name of a file")
    return name


def _list(content: Mapping[str, Any], name: str, item: Callable[[object], _Value]) -> tuple[_Value, ...]:
    return tuple(item(each) for each in _array(content[name]))


def _numbers(value: object) -> tuple[float | None, ...]:
    numbers: list[float | None] = []
    for each in _array(value):
        if each is not None and (isinstance(each, bool) or not isinstance(each, (int, float))):
            raise TypeError(f"expected a number, got {brief(each)}")
        numbers.append(None if each is None else float(each))
    return tuple(numbers)


def _array(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {brief(value)}")
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {brief(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {brief(value)}")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)
