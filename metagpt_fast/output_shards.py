"""Which tensor goes into which output file, and the exact header of each file, before a byte of data exists.

Pure functions: nothing here touches the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .dtypes import DType
from .safetensors_file import MAX_HEADER_NBYTES

# The data of every shard begins at a multiple of this, so that the kernels' writes are page-aligned.
DATA_ALIGNMENT_NBYTES = 4096

_METADATA = {"__metadata__": {"format": "pt"}}
_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output; within one output the names differ."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensor's data.

        Raises:
            ValueError: packed elements that do not fill whole bytes; ``open_checkpoint`` lets none pass.
        """
        nbytes = self.dtype.nbytes(self.numel)
        if nbytes is None:
            raise ValueError(f"{self.name!r}: {self.numel} elements of {self.dtype} do not fill whole bytes")
        return nbytes


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One safetensors file of the output.

    Attributes:
        file_name: name within the output folder.
        tensors: in the order of their data.
        header: the first bytes of the file: length, JSON and padding.
        nbytes: size of the whole file.
        data_offsets: where each tensor begins, in bytes from the start of the file.
    """

    file_name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes
    nbytes: int
    data_offsets: dict[str, int]


def plan_shards(
    tensors: Sequence[OutputTensor], max_shard_nbytes: int, *, stem: str = "model"
) -> tuple[OutputShard, ...]:
    """Distribute ``tensors`` over files: as many in each as fit, in the given order.

    Within a file the tensors are sorted by the size of their elements, largest first, as safetensors' own
    writer does, and otherwise keep the given order: with that every tensor is aligned to its elements.

    Args:
        tensors: all tensors of the output, with different names, which are valid UTF-8.
        max_shard_nbytes: no file gets larger than this, header included, unless one tensor alone does.
        stem: the files are ``{stem}.safetensors`` or ``{stem}-00001-of-0000N.safetensors``.

    Returns:
        At least one shard; without tensors, one that has only a header.
    """
    groups = _group(tensors, max_shard_nbytes)
    num_shards = len(groups)
    if num_shards == 1:
        return (_make_shard(f"{stem}.safetensors", groups[0]),)
    return tuple(
        _make_shard(f"{stem}-{index:05d}-of-{num_shards:05d}.safetensors", group)
        for index, group in enumerate(groups, start=1)
    )


def index_file_name(shards: Sequence[OutputShard]) -> str:
    """Return the name of the index of several shards: ``model.safetensors.index.json``."""
    stem = shards[0].file_name.rsplit("-", maxsplit=3)[0]
    return f"{stem}.safetensors.index.json"


def index_json(shards: Iterable[OutputShard]) -> bytes:
    """Return the index that tells which shard holds which tensor, in Hugging Face's form."""
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _group(tensors: Sequence[OutputTensor], max_shard_nbytes: int) -> list[list[OutputTensor]]:
    """Cut the list where the next tensor would make the file, or its header, too large."""
    # No offset inside a shard of several tensors has more digits than the limit, so this bounds every entry.
    widest_offset = max_shard_nbytes
    empty_header_nbytes = len(_encode_json(_METADATA))
    groups: list[list[OutputTensor]] = [[]]
    data_nbytes, json_nbytes = 0, empty_header_nbytes
    for tensor in tensors:
        entry_nbytes = len(_encode_json(_entry(tensor, widest_offset, widest_offset)).encode())
        file_nbytes = _data_begin(json_nbytes + entry_nbytes) + data_nbytes + tensor.nbytes
        if groups[-1] and (file_nbytes > max_shard_nbytes or json_nbytes + entry_nbytes > MAX_HEADER_NBYTES):
            groups.append([])
            data_nbytes, json_nbytes = 0, empty_header_nbytes
        groups[-1].append(tensor)
        data_nbytes += tensor.nbytes
        json_nbytes += entry_nbytes
    return groups


def _make_shard(file_name: str, group: list[OutputTensor]) -> OutputShard:
    ordered = tuple(sorted(group, key=lambda tensor: -tensor.dtype.bits))
    entries: dict[str, object] = dict(_METADATA)
    offsets: dict[str, int] = {}  # from the beginning of the data, as the header counts
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        offsets[tensor.name] = begin
        entries.update(_entry(tensor, begin, end))
    text = _encode_json(entries).encode()
    data_begin = _data_begin(len(text))
    # The format allows spaces behind the JSON; they count as part of the header.
    header = (data_begin - 8).to_bytes(8, "little") + text.ljust(data_begin - 8)
    return OutputShard(
        file_name=file_name,
        tensors=ordered,
        header=header,
        nbytes=data_begin + end,
        data_offsets={name: data_begin + offset for name, offset in offsets.items()},
    )


def _entry(tensor: OutputTensor, begin: int, end: int) -> dict[str, object]:
    facts = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return {tensor.name: facts}


def _data_begin(json_nbytes: int) -> int:
    """Offset of the first data byte in a file whose header has ``json_nbytes`` bytes of JSON."""
    return -(-(8 + json_nbytes) // DATA_ALIGNMENT_NBYTES) * DATA_ALIGNMENT_NBYTES
