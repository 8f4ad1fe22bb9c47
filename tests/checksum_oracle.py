"""CRC32C by division, one bit at a time, and the checksums of an output compared with it."""

from __future__ import annotations

import json
from pathlib import Path

from metagpt_fast.safetensors_file import read_header

# x^32 + x^28 + x^27 + x^26 + x^25 + x^23 + x^22 + x^20 + x^19 + x^18 + x^14 + x^13 + x^11 + x^10 + x^9 + x^8 + x^6 + 1
POLYNOMIAL = 0x1EDC6F41
_REFLECTED = int(f"{POLYNOMIAL:032b}"[::-1], 2)


def _after_a_byte(register: int) -> int:
    for _ in range(8):
        register = register >> 1 ^ (_REFLECTED if register & 1 else 0)
    return register


_TABLE = [_after_a_byte(value) for value in range(256)]


def slow_crc32c(data: bytes) -> int:
    """Return the CRC32C of ``data``."""
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def check_checksums(out: Path) -> None:
    """Compare every checksum in the record of a merge with the bytes of its output, a folder."""
    record = json.loads((out / "metagpt_fast.json").read_text())["output"]
    assert sorted(shard["name"] for shard in record["shards"]) == sorted(p.name for p in out.glob("*.safetensors"))
    for shard in record["shards"]:
        raw = (out / shard["name"]).read_bytes()
        assert shard["nbytes"] == len(raw)
        assert shard["crc32c"] == f"{slow_crc32c(raw):08x}"
        sources = sorted(read_header(out / shard["name"]).tensors, key=lambda each: (each.data_offset, each.nbytes))
        assert {each["name"] for each in shard["tensors"]} == {source.name for source in sources}
        offsets = {source.name: source.data_offset for source in sources}
        end = len(raw) - sum(each["nbytes"] for each in shard["tensors"])
        for each in shard["tensors"]:  # in the order of their bytes
            assert offsets[each["name"]] == end
            data = raw[end : end + each["nbytes"]]
            assert each["crc32c"] == f"{slow_crc32c(data):08x}"
            end += each["nbytes"]
