"""The tree of a config text, and the parser of strict JSON (RFC 8259) that builds it.

Every key and value has a `Mark` (source, line, column), so that diagnostics can point at it. A syntax error raises
`ConfigError` with the first mistake and how to fix it; duplicate keys raise it with all of them. `yaml_text` builds the
same tree from YAML.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]  # typeshed lacks scanstring
from typing import NoReturn, TypeAlias

from loopos.config.diagnostics import ConfigError, Diagnostic

Path: TypeAlias = tuple[str | int, ...]
Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

MOST_LEVELS = 64
_LINE_BREAK = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Mark:
    """A location: line and column start at 1; None on the command line."""

    source: str
    line: int | None = None
    column: int | None = None


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A single value; `text` is its spelling in the file."""

    value: bool | int | float | str | None
    text: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class ListNode:
    items: tuple[Node, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class MappingNode:
    """`keys` holds the mark of each key of `entries`, in the same order."""

    entries: dict[str, Node]
    keys: dict[str, Mark]
    mark: Mark


Node: TypeAlias = ScalarNode | ListNode | MappingNode


class LineTable:
    """Maps character offsets of one text to marks; a line ends at LF, CRLF or CR."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._starts = [0, *(match.end() for match in _LINE_BREAK.finditer(text))]

    def mark(self, offset: int) -> Mark:
        line = bisect.bisect_right(self._starts, offset)
        return Mark(self._source, line, offset - self._starts[line - 1] + 1)


def plain(node: Node) -> Plain:
    """The value of `node` as `json.loads` would return it."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items]
    return {key: plain(entry) for key, entry in node.entries.items()}


def child(node: Node, step: str | int) -> Node | None:
    """The child of `node` at `step`, or None."""
    if isinstance(node, MappingNode) and isinstance(step, str):
        return node.entries.get(step)
    if isinstance(node, ListNode) and isinstance(step, int) and 0 <= step < len(node.items):
        return node.items[step]
    return None


def find(node: Node, path: Sequence[str | int]) -> Node | None:
    """The node at `path`, or None if the user wrote none."""
    found: Node | None = node
    for step in path:
        if found is None:
            return None
        found = child(found, step)
    return found


def key_mark(node: Node, path: Sequence[str | int]) -> Mark:
    """The mark of the last key of `path`, of the item in a list, or else of the nearest parent."""
    parent = find(node, path[:-1])
    if isinstance(parent, MappingNode) and path[-1] in parent.keys:
        return parent.keys[str(path[-1])]
    return value_mark(node, path)


def value_mark(node: Node, path: Sequence[str | int]) -> Mark:
    """The mark of the value at `path`, or, if it is missing, of the key of the nearest section above."""
    for length in range(len(path), 0, -1):
        found = find(node, path[:length])
        if found is not None:
            return found.mark if length == len(path) else key_mark(node, path[:length])
    return node.mark


def with_entry(mapping: MappingNode, key: str, value: Node, mark: Mark) -> MappingNode:
    """A copy of `mapping` whose `key` is `value`."""
    return MappingNode({**mapping.entries, key: value}, {**mapping.keys, key: mark}, mapping.mark)


def without_entry(mapping: MappingNode, key: str) -> MappingNode:
    """A copy of `mapping` that lacks `key`."""
    entries = {name: entry for name, entry in mapping.entries.items() if name != key}
    return MappingNode(entries, {name: mapping.keys[name] for name in entries}, mapping.mark)


def dotted(path: Sequence[str | int]) -> str:
    """`("training", "betas", 0)` as `training.betas.0`, the form of overrides."""
    return ".".join(str(step) for step in path)


_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r"[+\-.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS: dict[str, bool | None] = {"null": None, "true": True, "false": False}
_OTHER_SPELLINGS = {
    **dict.fromkeys(("True", "TRUE", "yes", "on"), "true"),
    **dict.fromkeys(("False", "FALSE", "no", "off"), "false"),
    **dict.fromkeys(("None", "NULL", "Null", "nil", "undefined"), "null"),
}
_CURLY_QUOTES = "\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_COMMENT_HINT = "remove the comment, or write the config as .yaml, where # begins one"


def parse_json(text: str, source: str) -> Node:
    """The tree of a whole JSON text.

    Raises `ConfigError` with the first syntax error, or with all duplicate keys.
    """
    scanner = _Scanner(text, source)
    node, end = scanner.value(scanner.skip(0), 0)
    end = scanner.skip(end)
    if end < len(text):
        scanner.stop_at_comment(end)
        scanner.stop(end, f"{scanner.seen(end)} after the end of the value", "nothing more", "remove it")
    if scanner.repeated:
        raise ConfigError(scanner.repeated)
    return node


class _Scanner:
    """A recursive-descent parser; each method takes an offset and returns the node and the offset after it."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.lines = LineTable(text, source)
        self.repeated: list[Diagnostic] = []

    def mark(self, offset: int) -> Mark:
        return self.lines.mark(offset)

    def skip(self, offset: int) -> int:
        match = _SPACE.match(self.text, offset)
        assert match is not None
        return match.end()

    def seen(self, offset: int) -> str:
        """The token at `offset`, as shown in messages."""
        if offset >= len(self.text):
            return "the end of the text"
        token = _TOKEN.match(self.text, offset)
        return json.dumps(token.group()[:40] if token else self.text[offset], ensure_ascii=False)

    def stop(self, offset: int, actual: str, expected: str, hint: str = "") -> NoReturn:
        mark = self.mark(offset)
        raise ConfigError([Diagnostic(mark.source, mark.line, mark.column, "", actual, expected, hint)])

    def stop_at_comment(self, offset: int) -> None:
        if self.text.startswith(("//", "/*", "#"), offset):
            self.stop(offset, "a comment", "JSON, which has no comments", _COMMENT_HINT)

    def stop_at_quote(self, offset: int) -> None:
        if self.text[offset] in "'`" + _CURLY_QUOTES:
            self.stop(offset, f"the quote {self.text[offset]}", 'double quotes "', 'write "..." around text')

    def value(self, offset: int, level: int) -> tuple[Node, int]:
        if offset >= len(self.text):
            self.stop(offset, "the end of the text", "a value")
        if level > MOST_LEVELS:
            self.stop(offset, f"more than {MOST_LEVELS} levels of brackets", "fewer")
        first = self.text[offset]
        if first == "{":
            return self.mapping(offset, level)
        if first == "[":
            return self.list(offset, level)
        if first == '"':
            value, end = self.string(offset)
            return ScalarNode(value, self.text[offset:end], self.mark(offset)), end
        return self.token(offset)

    def token(self, offset: int) -> tuple[Node, int]:
        """A number, true, false or null."""
        match = _TOKEN.match(self.text, offset)
        if match is None:
            self.stop_at_comment(offset)
            self.stop_at_quote(offset)
            self.stop(offset, self.seen(offset), "a value: text in double quotes, a number, true, false, null, [ or {")
        token = match.group()
        if token in _CONSTANTS:
            return ScalarNode(_CONSTANTS[token], token, self.mark(offset)), match.end()
        number = _NUMBER.fullmatch(token)
        if number is None:
            self.stop_at_token(offset, token)
        if number.group(1) or number.group(2):
            return ScalarNode(float(token), token, self.mark(offset)), match.end()
        if len(token) > 4000:  # Python refuses to convert more than 4300 digits
            self.stop(offset, f"a number of {len(token)} digits", "a shorter number")
        return ScalarNode(int(token), token, self.mark(offset)), match.end()

    def stop_at_token(self, offset: int, token: str) -> NoReturn:
        if token.lstrip("+-").lower() in ("nan", "inf", "infinity"):
            self.stop(
                offset, token, "a finite number", "JSON has no NaN and no infinity; leave the key out for its default"
            )
        if token in _OTHER_SPELLINGS:
            self.stop(offset, token, _OTHER_SPELLINGS[token], f"JSON writes it {_OTHER_SPELLINGS[token]}")
        if token[0] in "+-.0123456789":
            hint = "write it as 0.5, 16 or 1e-5: no +, no leading zero, no _, a digit on both sides of the point"
            self.stop(offset, token[:40], "a number", hint)
        self.stop(offset, f"{token[:40]} without quotes", "a value", f'put text in double quotes: "{token[:40]}"')

    def string(self, offset: int) -> tuple[str, int]:
        try:
            value, end = scanstring(self.text, offset + 1, True)
        except JSONDecodeError as error:
            self.stop_in_string(offset, error)
        if _SURROGATE.search(value):
            self.stop(offset, r"text with half of a character (a lone \ud800-\udfff)", "whole characters")
        return value, end

    def stop_in_string(self, offset: int, error: JSONDecodeError) -> NoReturn:
        at = error.pos
        if error.msg.startswith("Unterminated"):
            self.stop(offset, "text whose quote is never closed", 'a closing "', 'write " at its end')
        if error.msg.startswith("Invalid control"):
            if self.text[at] in "\r\n":
                self.stop(offset, "text that continues past the end of its line", 'a closing " on the same line')
            name = "a tab" if self.text[at] == "\t" else f"the control character {ord(self.text[at]):#04x}"
            self.stop(at, f"{name} inside text", f"its escape, {json.dumps(self.text[at])[1:-1]}")
        back = self.text.rfind("\\", offset, at + 1)
        escape = self.text[back : back + 2]
        hint = r"a backslash is written \\; paths may be written with /"
        self.stop(back, f"the escape {escape}", r"\" \\ \/ \b \f \n \r \t or \u and four hexadecimal digits", hint)

    def list(self, opened: int, level: int) -> tuple[Node, int]:
        items: list[Node] = []
        offset = self.skip(opened + 1)
        while not self.text.startswith("]", offset):
            item, offset = self.value(offset, level + 1)
            items.append(item)
            offset = self.separator(opened, offset, "]")
        return ListNode(tuple(items), self.mark(opened)), offset + 1

    def mapping(self, opened: int, level: int) -> tuple[Node, int]:
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        offset = self.skip(opened + 1)
        while not self.text.startswith("}", offset):
            mark = self.mark(offset)
            key, offset = self.key(opened, offset)
            entry, offset = self.value(offset, level + 1)
            if key in keys:
                self.repeated.append(repeated_key(key, keys[key], mark))
            else:
                entries[key], keys[key] = entry, mark
            offset = self.separator(opened, offset, "}")
        return MappingNode(entries, keys, self.mark(opened)), offset + 1

    def key(self, opened: int, offset: int) -> tuple[str, int]:
        """A key and its colon."""
        self.stop_at_end(opened, offset, "}")
        if self.text[offset] != '"':
            self.stop_at_comment(offset)
            self.stop_at_quote(offset)
            token = _TOKEN.match(self.text, offset)
            hint = f'put keys in double quotes: "{token.group()[:40]}"' if token else ""
            self.stop(offset, self.seen(offset), 'a key in double quotes, or "}"', hint)
        key, end = self.string(offset)
        colon = self.skip(end)
        if not self.text.startswith(":", colon):
            self.stop(colon, f"{self.seen(colon)} after the key {json.dumps(key)}", 'a colon ":"', 'write "key": value')
        return key, self.skip(colon + 1)

    def separator(self, opened: int, end: int, closing: str) -> int:
        """The offset of the next entry, or of `closing`, after an entry that ended at `end`."""
        offset = self.skip(end)
        self.stop_at_end(opened, offset, closing)
        if self.text[offset] == closing:
            return offset
        if self.text[offset] != ",":
            self.stop_at_comment(offset)
            actual, hint = f"{self.seen(offset)} after a value", "separate entries by commas"
            if self.text[offset] in "]}":
                hint = f'the "{self.text[opened]}" of line {self.mark(opened).line} is still open'
            self.stop(offset, actual, f'a comma or "{closing}"', hint)
        after = self.skip(offset + 1)
        self.stop_at_end(opened, after, closing)
        if self.text[after] in "]}":
            actual = f'a comma before "{self.text[after]}"'
            self.stop(offset, actual, "no comma after the last entry", "remove the comma")
        return after

    def stop_at_end(self, opened: int, offset: int, closing: str) -> None:
        if offset >= len(self.text):
            hint = f'the "{self.text[opened]}" of line {self.mark(opened).line} is never closed'
            self.stop(offset, "the end of the text", f'"{closing}"', hint)


def repeated_key(key: str, first: Mark, again: Mark) -> Diagnostic:
    """The diagnostic for a duplicate key of one mapping."""
    actual = f"the key {json.dumps(key, ensure_ascii=False)} a second time"
    return Diagnostic(
        again.source, again.line, again.column, key, actual, "each key once", f"it is also in line {first.line}"
    )
