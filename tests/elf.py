"""Which shared libraries an ELF file asks for, without binutils."""

from __future__ import annotations

import struct
from pathlib import Path

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5


def needed_libraries(path: Path) -> list[str]:
    """Return the DT_NEEDED names of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
    header_offset, header_size, num_headers = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    segments = []  # (type, file offset, address, size in file)
    for i in range(num_headers):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, header_offset + i * header_size)
        segments.append((kind, offset, address, size))

    dynamic_offset, dynamic_size = next((offset, size) for kind, offset, _, size in segments if kind == PT_DYNAMIC)
    entries = list(struct.iter_unpack("<QQ", data[dynamic_offset : dynamic_offset + dynamic_size]))
    strings_address = next(value for tag, value in entries if tag == DT_STRTAB)
    strings = next(
        strings_address - address + offset
        for kind, offset, address, size in segments
        if kind == PT_LOAD and address <= strings_address < address + size
    )
    names = []
    for tag, value in entries:
        if tag == DT_NULL:
            break
        if tag == DT_NEEDED:
            names.append(data[strings + value : data.index(b"\0", strings + value)].decode())
    return names
