"""What the value of a cell is, in the words of a fault.

Enters: one value as a reader gave it. Leaves: why it is no text that a model can learn from, or None; names of kinds.
Left out: what the column means (`formats`, `supervised_formats`).
"""

from __future__ import annotations

from loopos.data.record import shown

Problem = tuple[str, str, str]
"""Why a value cannot be used: the reason to count it under, what was given, a hint (may be empty)."""


def text_problem(value: object) -> Problem | None:
    """Why `value` is no text that is not blank; None if it is."""
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
        given = f"{shown(text)}, with half of a surrogate pair"
        return "is not Unicode", given, r"a pair such as \ud83d\ude00 was cut"
    return None


def is_number(value: object) -> bool:
    """Whether `value` is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def kind_name(value: object) -> str:
    """The kind of a value in words, as JSON users say it."""
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
