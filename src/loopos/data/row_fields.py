"""The values of one row by role, with their problems.

A problem is a reason to count the row under and a diagnostic with file, line and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from loopos.config.diagnostics import Diagnostic, Remedy
from loopos.data.columns import listed, plain_name
from loopos.data.record import (
    kind_name,
    shown,
    spells_message,
    spells_messages,
    structure_of,
    text_problem,
    without_nulls,
)
from loopos.data.rows import Row

RowProblem: TypeAlias = tuple[str, Diagnostic]
_TEXT_EXPECTED = "a text that is not blank"
_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_MESSAGES_HINT = "write the list as JSON: json.dumps(row[column]), or use JSON Lines or parquet"


class RowFields:
    """Reads the fields of one row; invalid values are noted in `problems` and replaced by an empty value."""

    def __init__(self, row: Row, columns: Mapping[str, str], values: Mapping[str, object] | None = None) -> None:
        """columns: role → column. values: by column, where they are not those of the row."""
        self.row, self.columns = row, columns
        self.values = row.values if values is None else values
        self.problems: list[RowProblem] = []

    def has(self, role: str) -> bool:
        """Whether the role has a column."""
        return role in self.columns

    def field(self, role: str) -> str:
        """The column's name, for diagnostics."""
        return self.columns.get(role, role)

    def value(self, role: str) -> object:
        """The value of a role, without nulls inside objects; None if it is null or missing."""
        return without_nulls(self.values.get(self.columns[role])) if role in self.columns else None

    def structure(self, role: str) -> object:
        """The value of a role that holds a list or an object; its text form is parsed."""
        value = self.value(role)
        parsed = structure_of(value) if isinstance(value, str) else None
        return value if parsed is None else parsed

    def content(self, role: str) -> object:
        """The value of a role that holds a text or messages; messages in text form are parsed."""
        return self.content_value(self.field(role), self.value(role))

    def content_value(self, field: str, value: object) -> object:
        """`content` of a value. Text that starts like messages but is not valid is a problem."""
        if not isinstance(value, str) or not (spells_messages(value) or spells_message(value)):
            return value
        parsed = structure_of(value)
        if parsed is None and spells_messages(value):
            self.add("messages are not a list", field, f"{shown(value)}, which is neither JSON nor a Python list",
                     "a text, or a list of messages", _MESSAGES_HINT)  # fmt: skip
        is_message = isinstance(parsed, list) or (
            isinstance(parsed, dict) and ("content" in parsed or "value" in parsed)
        )
        return parsed if is_message else value

    def text(self, role: str) -> str:
        """The text of a required role, not blank."""
        if self._is_missing(role):
            return ""
        value = self.value(role)
        if isinstance(value, str) and spells_messages(value):
            hint = 'name the column as messages: data.columns: {"messages": "COLUMN"}'
            self.add(f"{role} holds messages", self.field(role), f"messages as text: {shown(value)}", "a text", hint)
            return ""
        return self.checked(role, self.field(role), value)

    def optional_text(self, role: str) -> str | None:
        """The text of an optional role; None if it is absent, null or blank."""
        value = self.value(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.checked(role, self.field(role), value) or None

    def listed_values(self, role: str, expected: str) -> list[object]:
        """The list of a required role, not empty."""
        value = self.structure(role)
        if self._is_missing(role):
            return []
        if not isinstance(value, list) or not value:
            actual = "an empty list" if value == [] else f"{kind_name(value)}"
            hint = ""
            if isinstance(value, str):
                actual, hint = f"text that is neither JSON nor a Python list: {shown(value)}", _MESSAGES_HINT
            self.add(f"{role} is not a list", self.field(role), actual, expected, hint)
            return []
        return value

    def checked(self, name: str, field: str, value: object) -> str:
        """`value` if it is a text that is not blank; otherwise "" and a problem counted under `name`."""
        problem = text_problem(value)
        if problem is None:
            assert isinstance(value, str)
            return value
        reason, actual, hint = problem
        self.add(f"{name} {reason}", field, actual, _TEXT_EXPECTED, hint)
        return ""

    def check_no_media(self) -> None:
        """Refuse images, video and audio in a row: a text model would train without them."""
        read = set(self.columns.values())
        for name, value in self.row.values.items():
            if value and plain_name(name) in _MEDIA and name not in read:
                hint = "remove these rows, or the column if the text makes sense without it"
                self.add(f"{plain_name(name)} beside text", name, f"{shown(value)} ({kind_name(value)})",
                         "rows of text", hint)  # fmt: skip

    def add(
        self, reason: str, field: str, actual: str, expected: str, hint: str = "", remedy: Remedy | None = None
    ) -> None:
        """Add a problem of the row."""
        self.problems.append(
            (reason, Diagnostic(self.row.source_label, self.row.line, None, field, actual, expected, hint, remedy))
        )

    def _is_missing(self, role: str) -> bool:
        if self.field(role) in self.values:
            return False
        actual = f"no such field (fields: {listed(list(self.row.values))})"
        self.add(f"{role} is missing", self.field(role), actual, _TEXT_EXPECTED)
        return True
