"""One PyTorch file (``pytorch_model.bin``, ``.pt``, ``.ckpt``): where its tensors lie, found without running it.

``torch.save`` writes a zip archive: a pickle that names the tensors, and an uncompressed record for each storage. The
pickle is looked through before it is loaded: it may name nothing but tensors and plain containers. Then torch's
weights-only loader maps the file and makes the tensors, and where their memory is in the mapping is where they are in
the file. That is checked against the archive's own directory, so the engine reads the file as it does safetensors.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
from .untrusted import brief, open_regular, printable, read_at, refuse

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
# What the pickle of a state dict names. torch's own list is longer, and has what takes time and memory without bound.
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|torch\.storage UntypedStorage|"
    r"torch (\w*Storage|b?float\d+\w*|u?int\d+|bool|complex\d+|Size)"
)
_MAX_OPCODES = 4_000_000  # 50,000 tensors take half of them
_MAX_TUPLES_AGAIN = 16  # tuples of tuples of the same tuple take 2^n steps to hash
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ")


def read_pickle_header(path: Path) -> ShardHeader:
    """Find the tensors of one file that ``torch.save`` wrote; of checkpoints of a training, those of ``state_dict``.

    Tensors that share memory are listed under each of their names.

    Raises:
        CheckpointError: torch is not installed; the file cannot be read, is of another form, holds something that is no
            tensor or that torch's weights-only loader refuses, a tensor that is not contiguous, or contradicts itself.
    """
    with open_regular(path) as (fd, info):
        if read_at(fd, len(_ZIP_MAGIC), 0) != _ZIP_MAGIC:
            what = "is not a file that torch.save wrote since PyTorch 1.6"
            refuse(path, what, expected="a zip archive", hint=CONVERT_PICKLE)
        archive = _read_archive(path, fd, info.st_size)
    _look_through(path, archive.pickle)
    tensors = _sources(path, archive.records)
    tensors.sort(key=lambda source: (source.data_offset, source.nbytes, source.name))
    digest = hashlib.sha256(repr([(t.name, str(t.dtype), t.shape, t.data_offset) for t in tensors]).encode())
    shard = ShardFile(path, info.st_size, info.st_mtime_ns, digest.hexdigest())
    return ShardHeader(shard, tensors, {"format": "pt"})


@dataclass(frozen=True)
class _Archive:
    pickle: bytes
    records: dict[int, int]  # where each record begins, and how many bytes it has


def _read_archive(path: Path, fd: int, file_nbytes: int) -> _Archive:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError) as error:
        refuse(path, "is a broken archive", got=printable(error)[:300], hint="download it again")
    # torch looks for names without regard to case.
    if len({entry.filename.lower() for entry in entries}) != len(entries):
        refuse(path, "archive has two records of one name", hint="do not trust this checkpoint")
    records = {}
    small: dict[str, bytes] = {}
    for entry in entries:
        name = brief(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            refuse(path, f"record {name} is compressed", expected="records as torch.save writes them")
        header = read_at(fd, _LOCAL_HEADER.size, entry.header_offset) if entry.header_offset < file_nbytes else b""
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
            refuse(path, f"record {name} is not where the archive says", hint="download it again")
        _, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
        begin = entry.header_offset + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
        if begin + entry.file_size > file_nbytes:
            refuse(path, f"record {name} ends behind the file", hint="download it again")
        records[begin] = entry.file_size
        kind = entry.filename.lower().rpartition("/")[2]
        if kind in {"data.pkl", "byteorder"}:
            if kind in small:
                refuse(path, f"archive has two records {kind}", hint="do not trust this checkpoint")
            if entry.file_size > MAX_HEADER_NBYTES:
                expected = f"at most {MAX_HEADER_NBYTES}"
                refuse(path, "pickle is too large", got=f"{entry.file_size} bytes", expected=expected)
            small[kind] = read_at(fd, entry.file_size, begin)
    if "data.pkl" not in small:
        refuse(path, "archive has no pickle", expected="data.pkl, as torch.save writes it", hint=CONVERT_PICKLE)
    if small.get("byteorder", b"little") != b"little":
        refuse(path, "is of a machine with another byte order", got=brief(small["byteorder"]), hint=CONVERT_PICKLE)
    return _Archive(small["data.pkl"], records)


def _look_through(path: Path, content: bytes) -> None:
    """Refuse a pickle that names something else than state dicts do, or that is made to take for ever."""
    tuples: set[object] = set()  # numbers in the pickle's memo
    num_again = count = 0
    previous = ""
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            name = opcode.name
            count += 1
            if name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
                got = printable(argument)[:200]
                what = "names something that is no tensor, which loading it would make"
                refuse(path, what, got=got, expected="the state dict of a model", hint=CONVERT_PICKLE)
            if name in {"STACK_GLOBAL", "INST", "OBJ", "DUP"} or count > _MAX_OPCODES:
                got = name if count <= _MAX_OPCODES else f"more than {_MAX_OPCODES} operations"
                refuse(path, "pickle is not as torch.save writes it", got=got, hint=CONVERT_PICKLE)
            if name in {"BINPUT", "LONG_BINPUT", "PUT"} and previous in {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}:
                tuples.add(argument)
            num_again += name in {"BINGET", "LONG_BINGET", "GET"} and argument in tuples
            if num_again > _MAX_TUPLES_AGAIN:
                refuse(path, "pickle is not as torch.save writes it", got="tuples of tuples", hint=CONVERT_PICKLE)
            previous = name
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        refuse(path, "pickle is broken", got=printable(error)[:300], hint="download it again")


def _sources(path: Path, records: Mapping[int, int]) -> list[TensorSource]:
    """Let torch make the tensors of the file it maps, and return where they lie."""
    try:
        import torch
    except ImportError as error:
        hint = "pip install 'metagpt_fast[gpu]' brings torch; or " + CONVERT_PICKLE
        raise CheckpointError("is a PyTorch file, which only torch can read", where=path, hint=hint) from error
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        text = _ESCAPES.sub("", str(error))
        reason = printable(found[1] if (found := _REASON.search(text)) else text.partition("\n")[0])[:300]
        hint = "do not trust this checkpoint, or convert it where you do"
        raise CheckpointError("torch's weights-only loader refuses it", where=path, got=reason, hint=hint) from error
    # Unbound methods: a pickle can give objects attributes.
    if isinstance(loaded, dict) and isinstance(inner := dict.get(loaded, "state_dict"), dict):
        loaded = inner
    if not isinstance(loaded, dict):
        refuse(path, "does not hold a state dict", got=type(loaded).__name__, expected="tensors by name")
    mappings = [
        (int(found[1], 16), int(found[2], 16), int(found[3], 16))
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        if (found := _MAPPING.match(line))
    ]
    sources = []
    for name, value in dict.items(loaded):
        if not isinstance(name, str) or name == "__metadata__":
            refuse(path, "has a name that no tensor can have", got=brief(name), expected="tensors by name")
        check_tensor_name(name, path)
        if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.layout != torch.strided:
            refuse(path, "is not a plain tensor", name, got=type(value).__name__, hint=CONVERT_PICKLE)
        if value.is_quantized or value.device.type != "cpu":
            refuse(path, "is not a plain tensor", name, got=f"{value.dtype} on {value.device}", hint=CONVERT_PICKLE)
        got = None
        if torch.Tensor.is_neg(value) or torch.Tensor.is_conj(value):
            got = "a negative or conjugate view"
        elif not torch.Tensor.is_contiguous(value):
            got = f"strides {tuple(torch.Tensor.stride(value))} for {tuple(value.shape)}"
        if got is not None:
            refuse(path, "elements are not as they lie in the file", name, got=got, hint=CONVERT_PICKLE)
        dtype = _BY_TORCH_NAME.get(str(value.dtype).removeprefix("torch."))
        if dtype is None:
            refuse(path, "unknown dtype", name, got=str(value.dtype), expected="one of " + ", ".join(DTYPES))
        storage = torch.Tensor.untyped_storage(value)
        place = int(torch.Tensor.storage_offset(value)) * dtype.itemsize, math.prod(value.shape) * dtype.itemsize
        begin = _place(path, name, storage.data_ptr(), place, mappings, records)
        sources.append(TensorSource(name, dtype, tuple(value.shape), path, begin))
    return sources


def _place(
    path: Path,
    name: str,
    address: int,
    place: tuple[int, int],
    mappings: list[tuple[int, int, int]],
    records: Mapping[int, int],
) -> int:
    """Return where in the file a tensor begins, whose ``place`` in its storage is (first byte, number of bytes)."""
    first, nbytes = place
    if nbytes == 0:
        return 0
    storage_begin = next((address - begin + offset for begin, end, offset in mappings if begin <= address < end), -1)
    if first < 0 or first + nbytes > records.get(storage_begin, -1):
        got = f"bytes {first} to {first + nbytes} of the record at {storage_begin}"
        refuse(path, "lies outside its record", name, got=got, hint="do not trust this checkpoint")
    return storage_begin + first
