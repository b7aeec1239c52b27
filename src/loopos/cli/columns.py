"""`--columns ROLE=COLUMN`: the words of the command line as the mapping that readers take.

Enters: words. Leaves: role → column. Left out: whether the role and the column exist (`data.formats`).
"""

from __future__ import annotations

from collections.abc import Sequence

from loopos.config.faults import UserError


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Role → column. Raises `UserError` for a word without = and for a role that is given twice."""
    columns: dict[str, str] = {}
    for word in words:
        role, equals, column = word.partition("=")
        if not equals or not role or not column:
            raise UserError(f"--columns: given {word}; wanted ROLE=COLUMN, for example text=review")
        if role in columns:
            raise UserError(f"--columns: given {role} twice ({columns[role]} and {column}); wanted one column a role")
        columns[role] = column
    return columns
