"""The tree of a config text: each key and value with its place.

Enters: values and their places, from a reader. Leaves: nodes that can be found by path, changed into new trees, and
turned into plain Python values. Left out: reading text (`json_text`, `yaml_text`) and judging values (`sections`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Path: TypeAlias = tuple[str | int, ...]
Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

MOST_LEVELS = 64
_LINE_BREAK = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place: line and column counted from 1, None on the command line."""

    source: str
    line: int | None = None
    column: int | None = None


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A value with no parts; `text` is how it was written."""

    value: bool | int | float | str | None
    text: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class ListNode:
    items: tuple[Node, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class MappingNode:
    """`keys` holds the place of each key of `entries`, in the same order."""

    entries: dict[str, Node]
    keys: dict[str, Mark]
    mark: Mark


Node: TypeAlias = ScalarNode | ListNode | MappingNode


class LineTable:
    """Character offsets of one text to marks; a line ends at LF, CRLF or CR."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._starts = [0, *(match.end() for match in _LINE_BREAK.finditer(text))]

    def mark(self, offset: int) -> Mark:
        line = bisect.bisect_right(self._starts, offset)
        return Mark(self._source, line, offset - self._starts[line - 1] + 1)


def plain(node: Node) -> Plain:
    """The value of `node` as `json.loads` would give it."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items]
    return {key: plain(entry) for key, entry in node.entries.items()}


def child(node: Node, step: str | int) -> Node | None:
    """The part of `node` that `step` names, or None."""
    if isinstance(node, MappingNode) and isinstance(step, str):
        return node.entries.get(step)
    if isinstance(node, ListNode) and isinstance(step, int) and 0 <= step < len(node.items):
        return node.items[step]
    return None


def find(node: Node, path: Sequence[str | int]) -> Node | None:
    """The node at `path`, or None where the user wrote none."""
    found: Node | None = node
    for step in path:
        if found is None:
            return None
        found = child(found, step)
    return found


def key_mark(node: Node, path: Sequence[str | int]) -> Mark:
    """The place of the key that ends `path`; for an item of a list, of the item; else the nearest place above."""
    parent = find(node, path[:-1])
    if isinstance(parent, MappingNode) and path[-1] in parent.keys:
        return parent.keys[str(path[-1])]
    return value_mark(node, path)


def value_mark(node: Node, path: Sequence[str | int]) -> Mark:
    """The place of the value at `path`, or, where it is missing, of the key of the nearest section above."""
    for length in range(len(path), 0, -1):
        found = find(node, path[:length])
        if found is not None:
            return found.mark if length == len(path) else key_mark(node, path[:length])
    return node.mark


def with_entry(mapping: MappingNode, key: str, value: Node, place: Mark) -> MappingNode:
    """A copy of `mapping` whose `key` is `value`."""
    return MappingNode({**mapping.entries, key: value}, {**mapping.keys, key: place}, mapping.mark)


def without_entry(mapping: MappingNode, key: str) -> MappingNode:
    """A copy of `mapping` that lacks `key`."""
    entries = {name: entry for name, entry in mapping.entries.items() if name != key}
    return MappingNode(entries, {name: mapping.keys[name] for name in entries}, mapping.mark)


def dotted(path: Sequence[str | int]) -> str:
    """`("training", "betas", 0)` as `training.betas.0`, the form that overrides take too."""
    return ".".join(str(step) for step in path)
