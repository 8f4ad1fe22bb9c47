"""Files that are nearly right: mutations of bytes, of JSON values and of lines, from a seeded generator."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

# What has broken readers before, here and elsewhere.
TEXTS = [
    "", ".", "..", "../model.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "model.safetensors", "\0", "\x1b[2J",
    "\u202e", "\ud800", "\n", "é", "x" * 5000, "__metadata__", "dtype", "shape", "data_offsets", "BF16", "F4", "(",
    "F64", "weight_map", "metagpt", "ties", "slerp", "base", "m0", "m1", "layer", "tensor", "model", "nan", "[a-z]+",
    "model-00001-of-00002.safetensors", "model.layers.0.mlp.up_proj.weight", "metagpt_fast.measurement", "@FOLDER@/out",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 4, 7, 8, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 + 1, 10**40,
    10**400, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, 1e308, -1e308, float("nan"), float("inf"), True, False, None,
]  # fmt: skip
TOKENS = [
    *(rb"""{ } [ ] : , " \ \u \ud800 - -0 1e999 0x1 NaN null true 2001-01-01 1_0 0o17 1:30 | > &a *a""").split(),
    *b"- |: |&a |*a |? |!!int |!!python/object:os.system |<<: *a|  |merge_method: |base_model: |weight: ".split(b"|"),
    *b"models:|slices:|sources:|parameters:|filter: mlp|layer_range: [0, 3]|dtype: float32|[0.1, 0.9]".split(b"|"),
    b"tokenizer_source: base\n", b"%YAML 1.1\n", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"9" * 300,
]  # fmt: skip

Rng = random.Random
MOST_NBYTES = 1 << 18  # of a file: larger ones are as slow as they are large


def mutate_bytes(rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return the content with one change of bytes."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + (1 << rng.randrange(8)))
    choice = rng.randrange(7)
    if choice == 0 and content:
        changed = bytearray(content)
        changed[at % len(content)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if choice == 1:
        return content[:at] + rng.choice(TOKENS) + content[at:]
    if choice == 2:
        return content[:at] + content[end:]
    if choice == 3:
        return content[:at] + content[at:end] * rng.choice((2, 2, 3, 50)) + content[end:]
    if choice == 4:
        return content[:at]
    if choice == 5 and others:
        other = rng.choice(others)
        first = rng.randrange(len(other) + 1)
        return content[:at] + other[first : first + (1 << rng.randrange(10))] + content[end:]
    return content[:at] + rng.randbytes(1 + rng.randrange(4)) + content[end:]


def mutate_lines(rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return the text with one change of whole lines."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    choice = rng.randrange(6)
    if choice == 0:
        del lines[at]
    elif choice == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif choice == 2 and others:
        lines.insert(at, rng.choice(rng.choice(others).split(b"\n")))
    elif choice == 3:
        lines[at] = rng.choice((b"  ", b"    ", b"- ", b"")) + lines[at].lstrip()
    elif choice == 4:
        key, colon, _ = lines[at].partition(b":")
        lines[at] = key + colon + b" " + rng.choice((str(rng.choice(NUMBERS)).encode(), rng.choice(TOKENS)))
    else:
        lines[at : at + 3] = [line for line in lines[at : at + 3] for _ in range(rng.choice((1, 2, 30)))]
    return b"\n".join(lines)


def mutate_json(rng: Rng, value: Any) -> Any:
    """Return the value after one change in it, anywhere."""
    places: list[tuple[Any, Any]] = []
    open_values = [value]
    while open_values:
        each = open_values.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, item in items:
            places.append((each, key))
            open_values.append(item)
    if not places:
        return rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), [], {}])
    parent, key = rng.choice(places)
    item = parent[key]
    choice = rng.randrange(9)
    if choice == 0:
        del parent[key]
    elif choice == 1 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key) if rng.random() < 0.5 else item
    else:
        parent[key] = mutate_item(rng, item, choice, places)
    return value


def mutate_item(rng: Rng, item: Any, choice: int, places: Sequence[tuple[Any, Any]]) -> Any:
    """Return what takes the place of one value."""
    if choice == 2 and isinstance(item, list) and item:
        return item * min(rng.choice((0, 2, 2, 3, 3, 30, 30, 20_000 // len(item))), MOST_NBYTES // len(dump(item)))
    if choice == 3:
        for _ in range(rng.choice((1, 2, 3, 70, 700))):
            item = [item] if rng.random() < 0.5 else {rng.choice(TEXTS): item}
        return item
    if choice == 4:
        parent, key = rng.choice(places)
        return parent[key]
    if choice == 5 and isinstance(item, (int, float)):
        return item + rng.choice((-1, 1, 0.5, 2**32)) if abs(item) < 1e300 else -item
    if choice == 6 and isinstance(item, str) and item:
        at = rng.randrange(len(item))
        return item[:at] + rng.choice(TEXTS) + item[at + rng.randrange(2) :]
    return rng.choice(TEXTS) if choice == 7 else rng.choice([*NUMBERS, [], {}, [0, 0], [1, 2, 3]])


def dump(value: Any) -> bytes:
    """Return JSON with what JSON does not have, lone surrogates and NaN."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000
    except ValueError:  # a value within itself, or an integer of too many digits for Python to write
        return b"1"


def mutate_json_file(rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return a JSON file with some changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if value is None or rng.random() < 0.3:
            content = mutate_bytes(rng, content, others)
        else:
            content = dump(mutate_json(rng, value))
    return content


def mutate_header_file(rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return a safetensors file with some changes, most of them with a length and a size that fit."""
    if len(content) < 8 or rng.random() < 0.1:
        return mutate_bytes(rng, content, others)
    nbytes = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + nbytes], content[8 + nbytes :]
    headers = [other[8 : 8 + int.from_bytes(other[:8], "little")] for other in others]
    header = mutate_json_file(rng, header, headers)
    if rng.random() < 0.5:
        end = _promised(header)
        data = (data + bytes(end))[:end] if end is not None else data
    return struct.pack("<Q", len(header)) + header + data


def mutate_recipe(rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return a recipe with some changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice((mutate_bytes, mutate_lines, mutate_lines))(rng, content, others)
    return content


def _promised(header: bytes) -> int | None:
    """The size of the data that a header speaks of, if it is small."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return end if isinstance(end, int) and 0 <= end < 1 << 16 else None


_MUTATE: dict[str, Callable[[Rng, bytes, Sequence[bytes]], bytes]] = {
    "header": mutate_header_file,
    "index": mutate_json_file,
    "recipe": mutate_recipe,
    "measurement": mutate_json_file,
    "record": mutate_json_file,
}


def mutate(name: str, rng: Rng, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return a file for a target, made from another one."""
    mutated = _MUTATE[name](rng, content, others)
    return mutated if len(mutated) <= MOST_NBYTES else content
