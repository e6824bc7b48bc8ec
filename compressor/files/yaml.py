"""Strict YAML: what is read is what was meant, or one line says where and why not.

Numbers, booleans and null are those of the YAML 1.2 core schema (`1e-3` is a number; `on`, `no`,
`2024-01-01` are text). Refused with their position: repeated keys, keys that are not text, tags,
aliases, infinities and NaN, numbers with a leading zero, documents that are empty, too long or
nested too deeply.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 30

_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+|0o[0-7]+)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Keys = tuple[str | int, ...]  # keys and list positions from the top of a document


@dataclass(frozen=True)
class Document:
    """A parsed document: plain values, and the place (`file:line`) of every key and list item."""

    value: Any
    places: dict[Keys, str]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file of at most `MAX_BYTES`. Raises ConfigError naming the file, and the
    byte that is not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return _within_size(data, str(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: byte {error.start} is not UTF-8 text") from None


def _within_size(data: bytes, where: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where}:1: longer than {MAX_BYTES} bytes, which no recipe needs")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse strict YAML to dicts, lists, str, int, float, bool and None. `where` names the source
    in messages.
    """
    return parse_document(text, where).value


def parse_document(text: str, where: str) -> Document:
    """Parse strict YAML and remember where each key stands. Raises ConfigError with `where:line`
    for everything refused.
    """
    _within_size(text.encode("utf-8", "surrogatepass"), where)
    try:
        node = _Composer(text, where).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}:{line}: not YAML: {reason}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(
            f"{where}:{line}: character #x{error.character:04x} is not allowed in YAML"
        ) from None
    if node is None:
        raise ConfigError(f"{where}:1: empty, expected a mapping of recipe sections")
    places: dict[Keys, str] = {}
    return Document(_construct(node, where, (), places), places)


class _Composer(yaml.SafeLoader):
    """PyYAML's node composer, which stops at tags, aliases and deep nesting as soon as it meets
    them.
    """

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self.where, self.depth = where, 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        at = f"{self.where}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{at}: '*{event.anchor}' is a YAML alias, which recipes do not use; put a "
                "pattern in quotes"
            )
        if event.tag is not None:
            raise ConfigError(
                f"{at}: the tag '{event.tag}' is refused; recipes hold plain values only"
            )
        if self.depth == MAX_DEPTH:
            raise ConfigError(f"{at}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _construct(node: yaml.Node, where: str, path: Keys, places: dict[Keys, str]) -> Any:
    at = f"{where}:{node.start_mark.line + 1}"
    places.setdefault(path, at)
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _plain(node.value, at)
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(item, where, (*path, index), places) for index, item in enumerate(node.value)
        ]
    mapping = {}
    for key_node, value_node in node.value:
        key, at = key_node.value, f"{where}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{at}: a key must be text")
        if key in mapping:
            raise ConfigError(
                f"{at}: key '{key}' is repeated; it stands at {places[(*path, key)]} already"
            )
        places[(*path, key)] = at
        mapping[key] = _construct(value_node, where, (*path, key), places)
    return mapping


def _plain(text: str, at: str) -> Any:
    """Resolve an unquoted scalar by the YAML 1.2 core schema. Raises ConfigError for numbers that
    are ambiguous or not finite.
    """
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS and (_FLOAT.fullmatch(text) or _INTEGER.fullmatch(text)):
        raise ConfigError(
            f"{at}: a number of {len(text)} characters; at most {MAX_DIGITS} are read"
        )
    if _LEADING_ZERO.fullmatch(text):
        raise ConfigError(
            f"{at}: '{text}' is ambiguous; write {int(text)} for a decimal number or quotes for "
            "text"
        )
    if _NOT_FINITE.fullmatch(text):
        raise ConfigError(f"{at}: '{text}' is not a finite number")
    if _INTEGER.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ConfigError(f"{at}: '{text}' is not a finite number")
        return value
    return text


BREAKS = set("\x85\u2028\u2029")  # line breaks to YAML, which only a double-quoted text keeps


class _Dumper(yaml.SafeDumper):
    """Writes what the reader above reads back: text that would be taken for something else is
    quoted.
    """

    def represent_str(self, text: str) -> yaml.ScalarNode:
        try:
            plain = _plain(text, "") == text and not BREAKS & set(text)
        except ConfigError:
            plain = False
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(value: Any) -> str:
    """Write plain values as YAML that `parse_yaml` reads back to the same values; keys keep their
    order.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
