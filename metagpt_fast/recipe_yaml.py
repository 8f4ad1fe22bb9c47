"""YAML as recipes use it, from strangers: plain values with the line of each, bounded in size, depth and expansion.

PyYAML reads the events; the values are built here, without recursion, so that no file can make the reader nest, expand
or guess without end. Scalars mean what they mean to PyYAML's safe loader (YAML 1.1: ``yes`` is a boolean, ``1e-5`` is a
text), except that dates stay texts. Every failure is one RecipeError that names file and line.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import CheckpointError, RecipeError
from .untrusted import brief, open_regular, read_at

MAX_NBYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 64
_MAX_NUMBER_LENGTH = 100  # longer ones are texts: Python's integers of many digits take quadratic time

_CORE = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_CORE + kind for kind in ("null", "bool", "int", "float", "str")}
_COLLECTION_TAGS = {None, "!", _CORE + "seq", _CORE + "map"}
_UNPRINTABLE = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Scalar = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class YamlNode:
    """One value of a YAML document.

    Attributes:
        value: a scalar, a list of nodes, or a dictionary of nodes by key.
        line: where it begins, from 1; for what an alias stands for, where the anchor is.
        key_lines: of a dictionary, the line of each key.
        num_nodes: how many values it consists of, aliases expanded.
        depth: how many levels it has, 1 for a scalar.
    """

    value: Scalar | list[YamlNode] | dict[str, YamlNode]
    line: int
    key_lines: dict[str, int] = field(default_factory=dict)
    num_nodes: int = 1
    depth: int = 1

    def plain(self) -> Any:
        """Return the value without lines: lists, dictionaries and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def line_of(self, *path: str | int) -> int:
        """Return the line of what the path leads to: of the key, or of the item; of the last part that exists."""
        node, line = self, self.line
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                line, node = node.key_lines[str(step)], node.value[str(step)]
            elif isinstance(node.value, list) and isinstance(step, int) and 0 <= step < len(node.value):
                node = node.value[step]
                line = node.line
        return line


@dataclass(slots=True)
class _Open:
    """A list or dictionary whose end has not been read."""

    value: list[YamlNode] | dict[str, YamlNode]
    line: int
    anchor: str | None
    key_lines: dict[str, int] = field(default_factory=dict)
    key: str | None = None  # read, and waiting for its value
    num_nodes: int = 1
    depth: int = 1

    def close(self) -> YamlNode:
        return YamlNode(self.value, self.line, self.key_lines, self.num_nodes, self.depth)


def read_text(path: Path) -> str:
    """Return the text of a recipe: at most 1 MiB of UTF-8; else RecipeError."""
    try:
        with open_regular(path) as (fd, info):
            if info.st_size > MAX_NBYTES:
                raise RecipeError(
                    "recipe is too large", where=path, got=f"{info.st_size} bytes", expected=f"at most {MAX_NBYTES}"
                )
            raw = read_at(fd, MAX_NBYTES, 0)
    except CheckpointError as error:
        raise RecipeError(
            error.what, where=error.where, got=error.got, expected=error.expected, hint=error.hint
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}:{raw.count(bytes([10]), 0, error.start) + 1}"
        got = f"the byte 0x{raw[error.start]:02x}"
        raise RecipeError("is not UTF-8 text", where=where, got=got, expected="a YAML file") from error
    return text


def parse_yaml(text: str, path: Path) -> YamlNode:
    """Return the one document of a YAML text; ``path`` is for messages.

    Raises:
        RecipeError: it is no YAML, holds control characters or lone surrogates, has no document or several, uses a key
            twice, a tag, a merge key or an alias within itself, or is larger than 1 MiB or 100,000 values (aliases
            expanded) or deeper than 64 levels.
    """
    if found := _UNPRINTABLE.search(text):
        where = f"{path}:{text.count(chr(10), 0, found.start()) + 1}"
        raise RecipeError("is not plain text", where=where, got=ascii(found.group()), expected="a YAML file")
    if len(text) > MAX_NBYTES:
        got, expected = f"{len(text)} characters", f"at most {MAX_NBYTES}"
        raise RecipeError("recipe is too large", where=path, got=got, expected=expected)
    return _Builder(path).build(text)


class _Builder:
    """Values from events, on a stack of our own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: list[_Open] = []
        self._anchors: dict[str, YamlNode | None] = {}  # None while the value is being read
        self._root: YamlNode | None = None

    def build(self, text: str) -> YamlNode:
        loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
        try:
            with contextlib.closing(yaml.parse(text, Loader=loader)) as events:
                for event in events:
                    self._take(event)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            got = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._error("is not valid YAML", None if mark is None else mark.line + 1, got=got) from error
        except yaml.YAMLError as error:
            raise self._error("is not valid YAML", None, got=brief(str(error))) from error
        if self._root is None:
            raise self._error("recipe is empty", 1, expected="merge_method, models and their parameters")
        return self._root

    def _take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self._take_alias(event.anchor, line)
        elif isinstance(event, yaml.ScalarEvent):
            self._anchor(event.anchor, line)
            if self._expects_key():
                self._take_key(event, line)
            else:
                self._add(YamlNode(self._scalar(event, line), line), event.anchor, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if event.tag not in _COLLECTION_TAGS:
                raise self._unknown_tag(event.tag, line)
            if self._expects_key():
                raise self._error("a key is not a plain text", line, got="a list or a mapping")
            if len(self._open) >= MAX_DEPTH:
                raise self._error("too many nested levels", line, expected=f"at most {MAX_DEPTH}")
            self._anchor(event.anchor, line)
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._open.append(_Open(value, line, event.anchor))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            closed = self._open.pop()
            self._add(closed.close(), closed.anchor, closed.line)
        elif isinstance(event, yaml.DocumentStartEvent) and self._root is not None:
            raise self._error("recipe has more than one document", line, expected="one", hint="remove the line ---")

    def _expects_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].value, dict) and self._open[-1].key is None

    def _take_key(self, event: Any, line: int) -> None:
        key = self._scalar(event, line)
        if not isinstance(key, str):
            hint = "put it in quotes if it is meant as a text"
            raise self._error("a key is not a text", line, got=brief(key), expected="a name", hint=hint)
        if event.implicit[0] and key == "<<":
            raise self._error("merge keys (<<) are not supported", line, hint="write the keys out")
        top = self._open[-1]
        if key in top.key_lines:
            raise self._error(f"the key {brief(key)} is there twice", line, got=f"also in line {top.key_lines[key]}")
        if event.anchor is not None:
            self._anchors[event.anchor] = YamlNode(key, line)
        top.key, top.key_lines[key] = key, line

    def _take_alias(self, anchor: str, line: int) -> None:
        if anchor not in self._anchors:
            raise self._error(f"the alias *{brief(anchor)[1:-1]} has no anchor", line)
        node = self._anchors[anchor]
        if node is None:
            raise self._error("an alias stands for a value that contains it", line)
        if self._expects_key():
            raise self._error("a key is not a plain text", line, got="an alias")
        self._add(node, None, line)

    def _anchor(self, anchor: str | None, line: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = None

    def _add(self, node: YamlNode, anchor: str | None, line: int) -> None:
        """Put a finished value where it belongs."""
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._open:
            self._root = node
            return
        top = self._open[-1]
        top.num_nodes += node.num_nodes
        top.depth = max(top.depth, node.depth + 1)
        if top.num_nodes > MAX_NODES:
            raise self._error("too many values, aliases expanded", line, expected=f"at most {MAX_NODES}")
        if len(self._open) + node.depth > MAX_DEPTH + 1:
            raise self._error("too many nested levels, aliases expanded", line, expected=f"at most {MAX_DEPTH}")
        if isinstance(top.value, list):
            top.value.append(node)
        elif top.key is not None:
            top.value[top.key] = node
            top.key = None

    def _scalar(self, event: Any, line: int) -> Scalar:
        """Return what a scalar means: by its tag, or if it is plain by what it looks like."""
        tag = event.tag
        if tag is None or tag == "!":
            is_plain = event.implicit[0] and len(event.value) <= _MAX_NUMBER_LENGTH
            tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False)) if is_plain else _CORE + "str"
            tag = tag if tag in _SCALAR_TAGS else _CORE + "str"  # dates and the like stay texts
        elif tag not in _SCALAR_TAGS:
            raise self._unknown_tag(tag, line)
        if tag == _CORE + "str":
            return str(event.value)
        if tag == _CORE + "null":
            return None
        construct = getattr(_CONSTRUCTOR, "construct_yaml_" + tag.removeprefix(_CORE))
        try:
            if len(event.value) <= _MAX_NUMBER_LENGTH:
                scalar: Scalar = construct(yaml.ScalarNode(tag, event.value))
                return scalar
        except (ValueError, KeyError, IndexError):
            pass
        kind = tag.removeprefix(_CORE)
        raise self._error(f"is no !!{kind}", line, got=brief(event.value), hint="leave the tag out")

    def _unknown_tag(self, tag: str, line: int) -> RecipeError:
        got = brief(tag.replace(_CORE, "!!"))
        return self._error("tags are not supported", line, got=got, hint="leave the tag out; recipes are plain data")

    def _error(
        self,
        what: str,
        line: int | None,
        *,
        got: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> RecipeError:
        where = self._path if line is None else f"{self._path}:{line}"
        return RecipeError(what, where=where, got=got, expected=expected, hint=hint)


_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
