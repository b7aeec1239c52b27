"""Lists and objects as cells hold them: as values, or as the text that spells them.

Enters: the value of a cell. Leaves: the list or object that a text spells, as JSON or as Python's `repr` (which is what
`pandas.to_csv` writes); values without the nulls that Arrow puts into the structs of a column where a row lacks a key.
Left out: what a list or an object means (`conversations`, `tool_schemas`, `choices`).
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_PYTHON_TEXT = 1_000_000
"""Characters of a Python literal that are parsed: its syntax tree takes some hundred bytes a character."""

_BRACKETS = {"[": "]", "{": "}"}
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value|weight|name|tool_calls)["']\s*:""")
_MESSAGE = re.compile(r"""\s*\{\s*["'](?:role|from)["']\s*:""")


def structure_of(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text spells in JSON or as a Python literal; None where it spells none.

    NaN and Infinity are no JSON; two strings side by side, as NumPy prints an array, are no Python list.
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
    """Whether a text begins as a list of messages does: kept as text it would be learned as such."""
    return _MESSAGES.match(text) is not None


def spells_message(text: str) -> bool:
    """Whether a text begins as a single message does."""
    return _MESSAGE.match(text) is not None


def without_nulls(value: object) -> object:
    """`value` without the keys of its objects that hold null, at any depth. Items of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def in_order(value: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An object with these keys first, then the others as they stand: Arrow keeps one order for a whole column."""
    first = {name: value[name] for name in names if name in value}
    return {**first, **{name: item for name, item in value.items() if name not in first}}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _python_literal(text: str) -> object:
    if len(text) > LONGEST_PYTHON_TEXT:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return None if _joins_strings(text) or not _is_plain(value) else value


def _joins_strings(text: str) -> bool:
    """Whether two strings stand side by side, which Python reads as one."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
            continue
        if token.type == before == tokenize.STRING:
            return True
        before = token.type
    return False


def _is_plain(value: object) -> bool:
    """Whether a value holds only what JSON can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
