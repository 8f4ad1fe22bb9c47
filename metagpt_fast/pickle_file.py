"""One PyTorch file (``pytorch_model.bin``, ``.pt``, ``.ckpt``): where its tensors lie, found without running it.

``torch.save`` writes a zip archive: a pickle that names the tensors, and an uncompressed record for each storage.
torch's weights-only loader reads the pickle and takes nothing but tensors and plain containers; under
``FakeTensorMode`` it reads no data and says at which offset each storage begins. That is checked against the
archive's own directory before anything else looks at it, so the engine maps the file as it does safetensors.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .dtypes import DTYPES
from .errors import CheckpointError
from .safetensors_file import (
    CONVERT_PICKLE,
    MAX_HEADER_NBYTES,
    ShardFile,
    ShardHeader,
    TensorSource,
    check_tensor_name,
)
from .untrusted import brief, open_regular, printable, read_at

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of each record: its magic, the lengths of its name and of what pads it
_EIGHT_BITS = {
    "float8_e4m3fn": DTYPES["F8_E4M3"],
    "float8_e5m2": DTYPES["F8_E5M2"],
    "float8_e4m3fnuz": DTYPES["F8_E4M3FNUZ"],
    "float8_e5m2fnuz": DTYPES["F8_E5M2FNUZ"],
}
_BY_TORCH_NAME = {name: dtype for dtype in DTYPES.values() if (name := dtype.torch_name or dtype.numpy_name)}
_BY_TORCH_NAME |= _EIGHT_BITS
# What torch's loader says in the middle of its advice, and the colours of that.
_REASON = re.compile(r"WeightsUnpickler error: ([^\n]*)")
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def read_pickle_header(path: Path) -> ShardHeader:
    """Find the tensors of one file that ``torch.save`` wrote; of checkpoints of a training, those of ``state_dict``.

    Tensors that share memory are listed under each of their names.

    Raises:
        CheckpointError: torch is not installed; the file cannot be read, is of another form, holds something that
            torch's weights-only loader refuses, a tensor that is not contiguous, or contradicts itself.
    """
    with open_regular(path) as (fd, info):
        if read_at(fd, len(_ZIP_MAGIC), 0) != _ZIP_MAGIC:
            what = "is not a file that torch.save wrote since PyTorch 1.6"
            _refuse(path, what, expected="a zip archive", hint=CONVERT_PICKLE)
        records = _records(path, fd, info.st_size)
    tensors = [_source(path, name, tensor, records) for name, tensor in _load(path).items()]
    tensors.sort(key=lambda source: (source.data_offset, source.nbytes, source.name))
    digest = hashlib.sha256(repr([(t.name, str(t.dtype), t.shape, t.data_offset) for t in tensors]).encode())
    shard = ShardFile(path, info.st_size, info.st_mtime_ns, digest.hexdigest())
    return ShardHeader(shard, tensors, {"format": "pt"})


def _records(path: Path, fd: int, file_nbytes: int) -> dict[int, int]:
    """Return where the archive's records begin, and how many bytes each has."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        _refuse(path, "is a broken archive", got=printable(error), hint="download it again")
    if len({entry.filename for entry in entries}) != len(entries):
        _refuse(path, "archive has two records of one name", hint="do not trust this checkpoint")
    records = {}
    for entry in entries:
        name = brief(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            _refuse(path, f"record {name} is compressed", expected="records as torch.save writes them")
        header = read_at(fd, _LOCAL_HEADER.size, entry.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
            _refuse(path, f"record {name} is not where the archive says", hint="download it again")
        _, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
        begin = entry.header_offset + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
        if begin + entry.file_size > file_nbytes:
            _refuse(path, f"record {name} ends behind the file", hint="download it again")
        if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_HEADER_NBYTES:
            _refuse(
                path, "pickle is too large", got=f"{entry.file_size} bytes", expected=f"at most {MAX_HEADER_NBYTES}"
            )
        records[begin] = entry.file_size
    return records


def _load(path: Path) -> dict[str, Any]:
    """Return torch's tensors by name, without their data."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        hint = "pip install 'metagpt_fast[gpu]' brings torch; or " + CONVERT_PICKLE
        raise CheckpointError("is a PyTorch file, which only torch can read", where=path, hint=hint) from error
    try:
        with FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = _ESCAPES.sub("", str(error))
        reason = printable(found[1] if (found := _REASON.search(text)) else text.partition("\n")[0])[:300]
        hint = "do not trust this checkpoint, or convert it where you do"
        raise CheckpointError("torch's weights-only loader refuses it", where=path, got=reason, hint=hint) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        _refuse(path, "does not hold a state dict", got=type(loaded).__name__, expected="tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str):
            _refuse(path, "has a name that is not a string", got=brief(name), expected="tensors by name")
        check_tensor_name(name, path)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            _refuse(path, "is not a plain tensor", name, got=type(value).__name__, hint=CONVERT_PICKLE)
    return dict(loaded)


def _source(path: Path, name: str, tensor: Any, records: Mapping[int, int]) -> TensorSource:
    dtype = _BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        _refuse(path, "unknown dtype", name, got=str(tensor.dtype), expected="one of " + ", ".join(DTYPES))
    if not tensor.is_contiguous():
        got = f"strides {tuple(tensor.stride())} for {tuple(tensor.shape)}"
        _refuse(path, "elements are not in their order", name, got=got, hint=CONVERT_PICKLE)
    storage_begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage_begin is None:
        _refuse(path, "torch does not say where it lies", name, expected="torch 2.7 or later", hint=CONVERT_PICKLE)
    begin = tensor.storage_offset() * dtype.itemsize
    nbytes = tensor.numel() * dtype.itemsize
    if begin < 0 or begin + nbytes > records.get(storage_begin, -1):
        got = f"bytes {begin} to {begin + nbytes} of the record at {storage_begin}"
        _refuse(path, "lies outside its record", name, got=got, hint="do not trust this checkpoint")
    return TensorSource(name, dtype, tuple(tensor.shape), path, storage_begin + begin)


def _refuse(path: Path, what: str, tensor: str | None = None, **parts: str) -> NoReturn:
    where = str(path) if tensor is None else f"{path}, tensor {brief(tensor)}"
    raise CheckpointError(what, where=where, **parts)
