"""Parse YAML into the nodes of `json_text`, with the scalars of YAML 1.2's core schema.

1e-5 is a number, and yes, no, on and off are text, unlike in PyYAML's YAML 1.1. Merge keys, other tags and several
documents in one file are errors.
"""

from __future__ import annotations

import re

import yaml

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.json_text import MOST_LEVELS, LineTable, ListNode, MappingNode, Mark, Node, ScalarNode, repeated_key

MOST_NODES = 100_000  # nested aliases can expand a few lines to a tree of any size
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema instead of its own resolvers."""


_Loader.yaml_implicit_resolvers = {}


for _name, _pattern, _firsts in (
    ("bool", _BOOLEAN, "tTfF"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INTEGER, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), list(_firsts))


def parse_yaml(text: str, source: str) -> Node | None:
    """The tree of a YAML text; None if it holds no value.

    Raises `ConfigError` with the first syntax error, or with every duplicate key, unsupported tag and key that is not
    text.
    """
    lines = LineTable(text, source)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_diagnostic(error, lines, text)]) from None
    except RecursionError:
        mark = lines.mark(0)
        actual = f"more than {MOST_LEVELS} levels"
        raise ConfigError([Diagnostic(source, mark.line, mark.column, "", actual, "fewer")]) from None
    if root is None:
        return None
    builder = _Builder(lines)
    node = builder.node(root, 0)
    if builder.diagnostics:
        raise ConfigError(builder.diagnostics)
    return node


def _syntax_diagnostic(error: yaml.YAMLError, lines: LineTable, text: str) -> Diagnostic:
    """PyYAML's error as a diagnostic."""
    if isinstance(error, yaml.reader.ReaderError):
        mark = lines.mark(error.position)
        return Diagnostic(
            mark.source, mark.line, mark.column, "", f"the character {error.character:#x}", "printable text"
        )
    assert isinstance(error, yaml.MarkedYAMLError)
    at = error.problem_mark or error.context_mark
    offset = at.index if at is not None else 0
    mark = lines.mark(offset)
    problem = " ".join(part for part in (error.problem, error.context) if part)
    hint = ""
    if "\\t" in problem or text[offset : offset + 1] == "\t":
        problem, hint = "a tab", "indent YAML by spaces"
    elif "mapping values are not allowed" in problem:
        hint = 'put text that contains ": " in quotes; check the indentation'
    elif "single document" in problem:
        hint = "remove the second document, after ---"
    return Diagnostic(mark.source, mark.line, mark.column, "", f"not valid YAML: {problem}", "", hint)


class _Builder:
    """Converts PyYAML's nodes to ours and collects diagnostics, so that all are reported at once."""

    def __init__(self, lines: LineTable) -> None:
        self.lines = lines
        self.diagnostics: list[Diagnostic] = []
        self.num_nodes = 0

    def diagnostic(self, node: yaml.Node, actual: str, expected: str, hint: str = "") -> None:
        mark = self.mark(node)
        self.diagnostics.append(Diagnostic(mark.source, mark.line, mark.column, "", actual, expected, hint))

    def mark(self, node: yaml.Node) -> Mark:
        return self.lines.mark(node.start_mark.index)

    def node(self, node: yaml.Node, level: int) -> Node:
        self.num_nodes += 1
        if level > MOST_LEVELS or self.num_nodes > MOST_NODES:
            actual = f"more than {MOST_LEVELS} levels" if level > MOST_LEVELS else f"more than {MOST_NODES} values"
            self.diagnostic(node, actual, "fewer", "an alias (*name) may contain itself or be repeated too often")
            raise ConfigError(self.diagnostics)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, level)
        if isinstance(node, yaml.SequenceNode):
            self.check_tag(node, "seq")
            return ListNode(tuple(self.node(item, level + 1) for item in node.value), self.mark(node))
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node)

    def check_tag(self, node: yaml.Node, name: str) -> None:
        if node.tag != _TAG + name:
            self.diagnostic(node, f"the tag {node.tag.replace(_TAG, '!!')}", "a plain value", "remove the tag")

    def mapping(self, node: yaml.MappingNode, level: int) -> Node:
        self.check_tag(node, "map")
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            mark = self.mark(key_node)
            if key_node.tag != _TAG + "str":
                self.diagnostic(key_node, "a key that is not text", "a text key", "put it in quotes")
                continue
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                self.diagnostic(key_node, "a merge key <<", "keys written out", "YAML 1.2 has no merge keys")
                continue
            entry = self.node(value_node, level + 1)
            if key in keys:
                self.diagnostics.append(repeated_key(key, keys[key], mark))
            else:
                entries[key], keys[key] = entry, mark
        return MappingNode(entries, keys, self.mark(node))

    def scalar(self, node: yaml.ScalarNode) -> Node:
        text, tag = str(node.value), node.tag.removeprefix(_TAG)
        value: bool | int | float | str | None = text
        if tag == "null" and _NULL.fullmatch(text):
            value = None
        elif tag == "bool" and _BOOLEAN.fullmatch(text):
            value = text.lower() == "true"
        elif tag == "int" and _INTEGER.fullmatch(text) and len(text) <= 4000:  # Python refuses more than 4300 digits
            value = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        elif tag == "float" and _FLOAT.fullmatch(text):
            value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        elif tag != "str":
            self.diagnostic(
                node, f"{text[:40]} with the tag {node.tag.replace(_TAG, '!!')}", "a plain value", "remove the tag"
            )
        return ScalarNode(value, text, self.mark(node))
