"""Basic types of the readers (`Record`, `ReadReport`, `BadRows`), and helpers to check and describe cell values.

`structure_of` parses lists and objects that a cell spells as JSON or as a Python `repr`, as pandas writes them to CSV.
`without_nulls` removes the keys that Arrow adds as null to objects of a column.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic, Remedy, Wording

MAXIMUM_DIAGNOSTICS = 20
"""Diagnostics shown in one error; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of one file: `line` is 1-based, the first physical line of the row; None where a file has no lines."""

    line: int | None
    values: dict[str, object]


Records: TypeAlias = Iterator[Record | Diagnostic]
"""A reader's output in file order: a `Record` for a good row, a `Diagnostic` for a bad one."""


@dataclass(slots=True)
class ReadReport:
    """Counts of one pass over a source. `rows_read` includes bad rows but not blank lines.

    `diagnostics` holds all of them under the skip policy, else the first ones; `num_diagnostics` counts all.
    `summary` holds the reader's decisions (a sniffed format, a delimiter). `class_names` holds, by column,
    the names that a data set written by `datasets` keeps for its integer classes.
    """

    source: str
    files: list[str]
    rows_read: int = 0
    bad_rows: int = 0
    num_diagnostics: int = 0
    blank_lines: int = 0
    diagnostics: list[Diagnostic] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def good_rows(self) -> int:
        """`rows_read` - `bad_rows`."""
        return self.rows_read - self.bad_rows

    def say(self, sentence: str) -> None:
        """Note a decision once, even if it applies to several files."""
        if sentence not in self.summary:
            self.summary.append(sentence)


def shown(value: Any, limit: int = 60) -> str:
    """`value` for an error message: its `repr`, cut to about `limit` characters."""
    if isinstance(value, str) and len(value) > limit:
        return repr(value[:limit]) + "..."
    text = repr(value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def file_error(
    source: str,
    actual: str,
    expected: str,
    hint: str = "",
    *,
    line: int | None = None,
    column: int | None = None,
    field: str = "file",
    remedy: Remedy | None = None,
) -> DataError:
    """An error that makes a whole file unreadable, independent of the policy for bad rows."""
    return DataError([Diagnostic(source, line, column, field, actual, expected, hint, remedy)])


SKIP_ROWS = Remedy("or leave them out", (("data.on_bad_row", "skip"),))
"""The alternative to correcting bad rows."""


class BadRows(DataError):
    """Rows that cannot be used: `diagnostics` are the first of them, `total` counts all; `advice` and `remedy` end the
    message.
    """

    total: int
    advice: str
    remedy: Remedy | None

    def __init__(
        self, diagnostics: Sequence[Diagnostic], total: int, advice: str, remedy: Remedy | None = None
    ) -> None:
        assert total >= len(diagnostics)
        super().__init__(diagnostics[:MAXIMUM_DIAGNOSTICS])
        self.total, self.advice, self.remedy = total, advice, remedy

    def message(self, wording: Wording) -> str:
        more = self.total - len(self.diagnostics)
        remedy = wording.remedy(self.remedy) if self.remedy is not None else ""
        advice = ", ".join(part for part in (self.advice, remedy) if part)
        return "\n".join([super().message(wording), *([f"... and {more} more problems"] if more else []), advice])


Problem = tuple[str, str, str]
"""Why a value cannot be used: the reason to count it under, the actual value, a hint (may be empty)."""


def text_problem(value: object) -> Problem | None:
    """Why `value` is not a nonblank text; None if it is one."""
    if value is None:
        return "is null", "null", ""
    if not isinstance(value, str):
        hint = "put it into double quotes" if is_number(value) else ""
        return "is not a string", f"{shown(value)} ({kind_name(value)})", hint
    if not value.strip():
        return "is blank", shown(value), ""
    return unicode_problem(value)


def unicode_problem(text: str) -> Problem | None:
    """Why `text` cannot be written as UTF-8 (half of a surrogate pair); None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        actual = f"{shown(text)}, with half of a surrogate pair"
        return "is not Unicode", actual, r"a pair such as \ud83d\ude00 was cut"
    return None


def is_number(value: object) -> bool:
    """Whether `value` is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def kind_name(value: object) -> str:
    """The kind of a value in JSON's terms."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
        str: "text",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


LONGEST_PYTHON_TEXT = 1_000_000
"""Characters of a Python literal that are parsed: its syntax tree takes some hundred bytes a character."""

_BRACKETS = {"[": "]", "{": "}"}
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value|weight|name|tool_calls)["']\s*:""")
_MESSAGE = re.compile(r"""\s*\{\s*["'](?:role|from)["']\s*:""")


def structure_of(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text spells in JSON or as a Python literal; None otherwise.

    NaN and Infinity are not JSON; adjacent strings, as NumPy prints arrays, are not a Python list.
    """
    stripped = text.strip()
    if not stripped or not stripped.endswith(_BRACKETS.get(stripped[0], "no bracket")):
        return None
    try:
        value = json.loads(stripped, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = _python_literal(stripped)
    return value if isinstance(value, list | dict) else None


def spells_messages(text: str) -> bool:
    """Whether a text starts like a list of messages, which must not be trained on as text."""
    return _MESSAGES.match(text) is not None


def spells_message(text: str) -> bool:
    """Whether a text starts like a single message."""
    return _MESSAGE.match(text) is not None


def without_nulls(value: object) -> object:
    """`value` without the keys of its objects that hold null, at any depth. Items of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def in_order(value: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An object with these keys first, then the others in their order: Arrow keeps one order for a whole column."""
    first = {name: value[name] for name in names if name in value}
    return {**first, **{name: item for name, item in value.items() if name not in first}}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON")


def _python_literal(text: str) -> object:
    if len(text) > LONGEST_PYTHON_TEXT:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return None if _joins_strings(text) or not _is_plain(value) else value


def _joins_strings(text: str) -> bool:
    """Whether two strings are adjacent, which Python joins."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
            continue
        if token.type == before == tokenize.STRING:
            return True
        before = token.type
    return False


def _is_plain(value: object) -> bool:
    """Whether JSON can represent a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
