"""Text that ships with Python, in three registers that nobody confuses: code, prose about it, and names of characters.

- ``code``: the standard library's modules without comments and docstrings, as ``ast.unparse`` writes them.
- ``prose``: the chapters of the language reference that ``help()`` shows, and the licence texts.
- ``names``: lines of the Unicode character database, such as ``03BB GREEK SMALL LETTER LAMDA``.

The base model is trained on all of it, the modules with their comments and docstrings. A tenth of the modules, chapters
and characters is held out from every training.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TASKS = ("code", "prose", "names")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = len(ALPHABET) + 1  # and one for every other character

_CODES = np.full(0x110000, len(ALPHABET), np.uint8)
_CODES[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET), dtype=np.uint8)
# Tables and tests, of which there is as much as of everything else together.
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "turtledemo",
}
_MAX_DOCUMENT = 60_000
# Named by rule: there are 100,000 of them and their names hold nothing but the number.
_NAMED_BY_RULE = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ", "EGYPTIAN ", "CUNEIFORM ", "ANATOLIAN ")

Tokens = NDArray[np.uint8]


def encode(text: str) -> Tokens:
    """Return the characters' numbers, below ``VOCAB_SIZE``."""
    codepoints = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    tokens: Tokens = _CODES[codepoints]
    return tokens


def load_texts(num_modules: int | None = None) -> dict[str, dict[str, Tokens]]:
    """Return ``train`` and ``test`` text of ``base`` and of each task; the base has no test text of its own.

    Args:
        num_modules: read only so many modules; all of them where it is None.
    """
    modules = list(islice(_modules(), num_modules))
    commented = [(name, text[:_MAX_DOCUMENT]) for name, text, _ in modules]
    code = [(name, ast.unparse(_without_docstrings(tree))[:_MAX_DOCUMENT]) for name, _, tree in modules]
    prose, names = list(_chapters()), list(_characters())
    texts = {task: _split(parts) for task, parts in zip(TASKS, (code, prose, names), strict=True)}
    # Repeated so that each register has a say: code 2, prose 1, names 1.
    base = _split(commented)["train"]
    share = len(base) // 2
    texts["base"] = {
        "train": np.concatenate([base, *(_repeated(texts[t]["train"], share) for t in ("prose", "names"))])
    }
    return texts


def _split(documents: list[tuple[str, str]]) -> dict[str, Tokens]:
    """Held out by name, so that the same document is held out in every form; in a shuffled, fixed order."""
    random.Random(0).shuffle(documents)
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for name, text in documents:
        parts["test" if zlib.crc32(name.encode()) % 10 == 0 else "train"].append(text)
    return {part: encode("\n".join(texts)) for part, texts in parts.items()}


def _repeated(tokens: Tokens, length: int) -> Tokens:
    repeated: Tokens = np.resize(tokens, length)
    return repeated


def _modules() -> Iterator[tuple[str, str, ast.Module]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if _LEFT_OUT & set(name.parts) or path.stat().st_size > 300_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        yield str(name), text, tree


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body[0] = ast.Pass() if len(node.body) == 1 else node.body.pop(1)
    return tree


def _chapters() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        for i, paragraph in enumerate(text.split("\n\n")):
            yield f"{name}{i // 8}", paragraph + "\n"


def _characters() -> Iterator[tuple[str, str]]:
    for codepoint in range(0x110000):
        name = unicodedata.name(chr(codepoint), "")
        if name and not name.startswith(_NAMED_BY_RULE):
            yield name, f"{codepoint:04X} {name}"
