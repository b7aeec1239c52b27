"""The values of one row by role, and what is wrong with them.

Enters: a `Row` and the column of each role. Leaves: texts, and a list of problems: a reason to count the row under,
with the fault that names file, line and field. Left out: which columns play which role (`supervised_formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from loopos.config.faults import Fault, Remedy
from loopos.data.columns import listed
from loopos.data.rows import Row
from loopos.data.values import kind_name, text_problem

RowProblem: TypeAlias = tuple[str, Fault]
_TEXT_WANTED = "a text that is not blank"


class RowFields:
    """Reads the fields of one row; what does not fit is noted in `problems`, and an empty stand-in is returned."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        """columns: role → column."""
        self.row, self.columns = row, columns
        self.problems: list[RowProblem] = []

    def has(self, role: str) -> bool:
        """Whether a column plays this role."""
        return role in self.columns

    def field(self, role: str) -> str:
        """The column's name, for faults."""
        return self.columns.get(role, role)

    def value(self, role: str) -> object:
        """What the row holds for a role; None where it is null or missing."""
        return self.row.values.get(self.columns[role]) if role in self.columns else None

    def text(self, role: str) -> str:
        """The text of a role that must be there and not blank."""
        if self._is_missing(role):
            return ""
        return self.checked(role, self.field(role), self.value(role))

    def optional_text(self, role: str) -> str | None:
        """The text of a role that may be absent, null or blank: None then."""
        value = self.value(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.checked(role, self.field(role), value) or None

    def listed_values(self, role: str, wanted: str) -> list[object]:
        """The list of a role that must be there and not empty."""
        value = self.value(role)
        if self._is_missing(role):
            return []
        if not isinstance(value, list) or not value:
            given = "an empty list" if value == [] else f"{kind_name(value)}"
            hint = "in CSV a cell cannot hold messages: use JSON Lines or parquet" if isinstance(value, str) else ""
            self.add(f"{role} is no list", self.field(role), given, wanted, hint)
            return []
        return value

    def checked(self, name: str, field: str, value: object) -> str:
        """`value` if it is a text that is not blank; else a problem counted under `name`, and ""."""
        problem = text_problem(value)
        if problem is None:
            assert isinstance(value, str)
            return value
        reason, given, hint = problem
        self.add(f"{name} {reason}", field, given, _TEXT_WANTED, hint)
        return ""

    def add(
        self, reason: str, field: str, given: str, wanted: str, hint: str = "", remedy: Remedy | None = None
    ) -> None:
        """Notes a problem of the row."""
        self.problems.append((reason, Fault(self.row.place, self.row.line, None, field, given, wanted, hint, remedy)))

    def _is_missing(self, role: str) -> bool:
        if self.field(role) in self.row.values:
            return False
        given = f"no such field (there: {listed(list(self.row.values))})"
        self.add(f"{role} is missing", self.field(role), given, _TEXT_WANTED)
        return True
