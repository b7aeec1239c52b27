"""Read a config file and command-line overrides into one tree of nodes.

`.json` is read as JSON, `.yaml` and `.yml` as YAML, any other name by content. Overrides are `key.path=value`
arguments. Mistakes raise `ConfigError`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loopos.config.diagnostics import ConfigError, Diagnostic
from loopos.config.json_text import (
    MOST_LEVELS,
    LineTable,
    ListNode,
    MappingNode,
    Mark,
    Node,
    ScalarNode,
    child,
    dotted,
    find,
    parse_json,
    plain,
    with_entry,
)

MOST_BYTES = 10_000_000
COMMAND_LINE = "command line"
IN_PYTHON = "config"
"""The source name of a config that is a dict."""
_OVERRIDE_KEY = re.compile(r"[A-Za-z0-9_$-]+(?:\.[A-Za-z0-9_$-]+)*")
CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
# Files with these suffixes are data; .json and .txt are recognized by content.
_DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx", ".gz", ".zst")
_MOST_NAMED = 5
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Source:
    """One config file: its path as the user wrote it, its text, its tree."""

    path: str
    text: str
    root: MappingNode


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read and parse a config file.

    Raises `ConfigError` if the file is missing, unreadable, not UTF-8, empty, over 10 MB or not valid JSON or YAML, or
    if its top level is not a mapping.
    """
    name = os.fspath(path)
    if name.lower().endswith(_DATA_SUFFIXES) and os.path.isfile(name):
        raise _data_file_error(name)
    text = _read_text(name)
    try:
        root = parse_text(text, name)
    except ConfigError:
        if name.lower().endswith(".txt"):
            raise _data_file_error(name) from None
        raise
    if root is None:
        raise _file_error(
            name, "a file without settings", 'a mapping with "model", "computation", "training" and "data"'
        )
    if isinstance(root, ListNode) and root.items and isinstance(root.items[0], MappingNode):
        raise _data_file_error(name)
    if not isinstance(root, MappingNode):
        actual = "a list" if isinstance(root, ListNode) else "a single value"
        expected = 'a mapping with "model", "computation", "training" and "data"'
        raise ConfigError(
            [
                Diagnostic(
                    name, root.mark.line, root.mark.column, "", actual, expected, "put { and } around the settings"
                )
            ]
        )
    return Source(name, text, root)


def source_of(values: Mapping[str, object]) -> Source:
    """The source of a config from Python. Raises `ConfigError` for values that a config file cannot express."""
    root = _node_of(values, (), Mark(IN_PYTHON))
    assert isinstance(root, MappingNode), "a mapping becomes a MappingNode"
    return Source(IN_PYTHON, json.dumps(plain(root), indent=2, ensure_ascii=False), root)


def source_on_command_line(values: Mapping[str, object], overrides: Sequence[str] = ()) -> Source:
    """The source of a recipe that is written on the command line: keys with their values, then `key=value` arguments.
    Raises `ConfigError`.
    """
    root = with_values(MappingNode({}, {}, Mark(COMMAND_LINE)), values)
    return Source(COMMAND_LINE, "", apply_overrides(root, overrides))


def with_values(root: MappingNode, values: Mapping[str, object]) -> MappingNode:
    """Set values of the command line in `root`: dotted key → value. Raises `ConfigError` for a path that does not
    exist.
    """
    mark = Mark(COMMAND_LINE)
    nodes = {key: _node_of(value, tuple(key.split(".")), mark) for key, value in values.items()}
    root, diagnostics = _with_nodes(root, nodes.items())
    if diagnostics:
        raise ConfigError(diagnostics)
    return root


def _node_of(value: object, path: tuple[str, ...], mark: Mark, depth: int = 0) -> Node:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return ScalarNode(value, json.dumps(value, ensure_ascii=False), mark)
    if depth < MOST_LEVELS and isinstance(value, list | tuple):
        return ListNode(
            tuple(_node_of(item, (*path, str(index)), mark, depth + 1) for index, item in enumerate(value)), mark
        )
    if depth < MOST_LEVELS and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        entries = {key: _node_of(item, (*path, key), mark, depth + 1) for key, item in value.items()}
        return MappingNode(entries, dict.fromkeys(entries, mark), mark)
    got = f"{value!r:.80} ({type(value).__name__})"
    expected = "text, a number, true, false, None, a list or a dict with text as keys"
    raise ConfigError([Diagnostic(mark.source, None, None, ".".join(path), got, expected)])


def parse_text(text: str, name: str) -> Node | None:
    """The tree of `text`, in the format of the suffix of `name`, else by content; None if it holds no value."""
    suffix = os.path.splitext(name)[1].lower()
    start = text.lstrip()
    if not start:
        return None
    if suffix == ".json" or (suffix not in (".yaml", ".yml") and start[0] in "{["):
        return parse_json(text, name)
    from loopos.config.yaml_text import parse_yaml  # 30 ms that a JSON config does not pay

    return parse_yaml(text, name)


def apply_overrides(root: MappingNode, overrides: Sequence[str]) -> MappingNode:
    """Set each `key.path=value` in `root`, in order; a value is parsed as JSON, else it is text.

    Missing sections are created; a list item is addressed by its index (`model.labels.0=spam`). Raises `ConfigError`
    with every override that has another form or whose path does not exist.
    """
    diagnostics: list[Diagnostic] = []
    nodes: list[tuple[str, Node]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            actual = f'"{override}"' if equals else f'"{override}", without ='
            diagnostics.append(
                _override_diagnostic("", actual, "key.path=value", "for example training.learning_rate=1e-5")
            )
            continue
        nodes.append((key, _override_value(text)))
    root, misplaced = _with_nodes(root, nodes)
    if diagnostics or misplaced:
        raise ConfigError([*diagnostics, *misplaced])
    return root


def _with_nodes(root: MappingNode, nodes: Iterable[tuple[str, Node]]) -> tuple[MappingNode, list[Diagnostic]]:
    """`root` with each value at its dotted key, and diagnostics of the keys that have no place in it."""
    diagnostics: list[Diagnostic] = []
    for key, node in nodes:
        try:
            changed = _with_value(root, key.split("."), node, ())
        except ConfigError as error:
            diagnostics.extend(error.diagnostics)
            continue
        assert isinstance(changed, MappingNode), "no path is empty"
        root = changed
    return root, diagnostics


def special_file(path: str) -> str:
    """The kind of a special file at `path`: a pipe, socket or device, since opening one may block forever.

    Empty for regular files, folders and missing paths.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    return next((kind for test, kind in (*kinds, (stat.S_ISBLK, "a device")) if test(mode)), "")


def close_matches(name: str, names: Sequence[str], cutoff: float = 0.6) -> list[str]:
    """At most three of `names` that are close to `name`, best first; case is ignored.

    `cutoff` is the minimum similarity from 0 to 1 (difflib's ratio).
    """
    by_folded = {candidate.lower(): candidate for candidate in reversed(names)}
    return [by_folded[match] for match in difflib.get_close_matches(name.lower(), list(by_folded), n=3, cutoff=cutoff)]


def close_files(path: str) -> list[str]:
    """Files or folders next to `path` with a close name, as paths in the same form."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        beside = sorted(os.listdir(folder or "."))[:2000]
    except (OSError, ValueError):
        return []
    return [os.path.join(folder, match) for match in close_matches(name, beside)]


def _file_error(name: str, actual: str, expected: str, hint: str = "") -> ConfigError:
    return ConfigError([Diagnostic(name, None, None, "", actual, expected, hint)])


def _other_configs(name: str) -> str:
    """The hint for a missing config: the one with a close name, or the configs in the same folder."""
    close = [path for path in close_files(name) if path.lower().endswith(CONFIG_SUFFIXES)]
    if close:
        return f"did you mean {close[0]}?"
    folder = os.path.dirname(name) or "."
    try:
        beside = sorted(each for each in os.listdir(folder) if each.lower().endswith(CONFIG_SUFFIXES))
    except (OSError, ValueError):
        beside = []
    if beside:
        more = ", ..." if len(beside) > _MOST_NAMED else ""
        return f"configs in {folder}: {', '.join(beside[:_MOST_NAMED])}{more}"
    return "check the path; relative paths start at the current directory"


def _data_file_error(name: str) -> ConfigError:
    """The error for a data file in place of a config, with an example of a config for it."""
    with open(name, "rb") as file:
        start = file.read(4096).decode("utf-8", errors="replace").lower()
    methods = {
        "sft": ("messages", "conversations", "instruction", "completion"),
        "reward_model": ("chosen",),
        "chain_of_thought": ("problem",),
    }
    method = next((name for name, columns in methods.items() if any(f'"{each}"' in start for each in columns)), "")
    run = os.path.basename(name).partition(".")[0] or "run"
    example = {
        "computation": {"mode": "posttraining", "method": method or "fine_tuning"},
        "training": {"learning_rate": 5e-5},
        "data": {"pretrained_weights": "smollm2-135m", "training_data": name, "output_dir": f"outputs/{run}"},
    }
    hint = f"write a config that names it, for example {run}.json:\n{json.dumps(example, ensure_ascii=False)}"
    return ConfigError([Diagnostic(name, None, None, "", "this is a data file, not a config", "", hint)])


def _read_text(name: str) -> str:
    expected = "a config file (.json, .yaml or .yml)"
    if "\0" in name:
        raise _file_error(name, "a path with a NUL character", expected)
    kind = special_file(name)
    if kind:
        raise _file_error(name, kind, expected, "write the config into a file first")
    try:
        with open(name, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise _file_error(name, "a path that does not exist", expected, _other_configs(name)) from None
    except IsADirectoryError:
        raise _file_error(name, "a folder", expected, "name the file inside it") from None
    except OSError as error:
        raise _file_error(name, f"a file that cannot be read ({error.strerror})", expected) from None
    if len(data) > MOST_BYTES:
        raise _file_error(name, f"a file of more than {MOST_BYTES:,} bytes", expected, "is this a data file?")
    return _decode(data, name)


def _decode(data: bytes, name: str) -> str:
    expected = "plain text in UTF-8"
    if data.startswith(_UTF16_MARKS):
        raise ConfigError([Diagnostic(name, 1, 1, "", "text in UTF-16", expected, "save the file as UTF-8")])
    if data.startswith(b"\xef\xbb\xbf"):
        actual = "a byte-order mark (BOM) before the text"
        raise ConfigError([Diagnostic(name, 1, 1, "", actual, "plain UTF-8", "save the file as UTF-8 without BOM")])
    try:
        text = data.decode("utf-8")
        offset = text.find("\0")
        actual = "a NUL byte: a binary file?"
    except UnicodeDecodeError as error:
        text = data[: error.start].decode("utf-8")
        offset = error.start
        actual = f"the byte {data[offset]:#04x} at offset {offset}, which is not UTF-8"
        offset = len(text)
    else:
        if offset < 0:
            return text
    mark = LineTable(text, name).mark(offset)
    raise ConfigError([Diagnostic(name, mark.line, mark.column, "", actual, expected, "save the file as UTF-8")])


def _override_diagnostic(field: str, actual: str, expected: str, hint: str = "") -> Diagnostic:
    return Diagnostic(COMMAND_LINE, None, None, field, actual, expected, hint)


def _override_value(text: str) -> Node:
    mark = Mark(COMMAND_LINE)
    try:
        return _on_command_line(parse_json(text, COMMAND_LINE))
    except ConfigError:
        return ScalarNode(text, text, mark)


def _on_command_line(node: Node) -> Node:
    """Replace the marks: positions inside an override would read like positions in the file."""
    mark = Mark(COMMAND_LINE)
    if isinstance(node, ScalarNode):
        return ScalarNode(node.value, node.text, mark)
    if isinstance(node, ListNode):
        return ListNode(tuple(_on_command_line(item) for item in node.items), mark)
    entries = {key: _on_command_line(entry) for key, entry in node.entries.items()}
    return MappingNode(entries, dict.fromkeys(entries, mark), mark)


def _with_value(node: Node, steps: Sequence[str], value: Node, above: tuple[str, ...]) -> Node:
    """A copy of `node` with `value` at the path `steps`."""
    if not steps:
        return value
    mark = Mark(COMMAND_LINE)
    step, rest = steps[0], steps[1:]
    here = (*above, step)
    if isinstance(node, MappingNode):
        part = child(node, step)
        if rest and (part is None or (isinstance(part, ScalarNode) and part.value is None)):
            part = MappingNode({}, {}, mark)
        return with_entry(node, step, value if part is None else _with_value(part, rest, value, here), mark)
    field = dotted((*above, *steps))
    if isinstance(node, ListNode):
        if not step.isascii() or not step.isdigit() or int(step[:9]) >= len(node.items):
            expected = f"a number from 0 to {len(node.items) - 1}" if node.items else "no number: the list is empty"
            actual = f"item {step} of {dotted(above)}"
            raise ConfigError(
                [_override_diagnostic(field, actual, expected, f"or set the whole list: {dotted(above)}=[...]")]
            )
        index = int(step)
        changed = _with_value(node.items[index], rest, value, here)
        return ListNode((*node.items[:index], changed, *node.items[index + 1 :]), node.mark)
    actual = f"a path below {dotted(above)}, which is a single value"
    raise ConfigError([_override_diagnostic(field, actual, "a path that ends there")])


def as_mapping(node: Node, step: str) -> MappingNode | None:
    """The section `step` of `node`; None if it is missing or not a section."""
    section = find(node, (step,))
    return section if isinstance(section, MappingNode) else None
