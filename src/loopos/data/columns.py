"""The names of columns: how they are compared, and which the user chose.

Enters: the columns of a source and `data.columns`. Leaves: the columns that a role's names fit, faults for a choice
that fits nothing. Left out: which names a role goes by (`column_names`, `supervised_formats`), values (`values`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from loopos.config.faults import DataError, Fault
from loopos.data.record import shown


def plain_name(name: str) -> str:
    """A column's name without regard to case, blanks and dashes."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def listed(columns: Sequence[str]) -> str:
    """The names of columns for a message, twenty at most."""
    return ", ".join(shown(name) for name in columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"


def unread(columns: Sequence[str], read: Iterable[str | None]) -> tuple[str, ...]:
    """The columns that no role reads."""
    taken = set(read)
    return tuple(name for name in columns if name not in taken)


def named(columns: Sequence[str]) -> str:
    """The names of columns for a sentence, twenty at most; quoted where a bare name could be misread."""
    names = [
        name if name.isprintable() and name.strip() == name and "," not in name else shown(name) for name in columns
    ]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def candidates(columns: Sequence[str], tiers: Sequence[frozenset[str]]) -> list[str]:
    """The columns named in the first tier that names any."""
    return next((found for tier in tiers if (found := [name for name in columns if plain_name(name) in tier])), [])


def ambiguous(role: str, found: Sequence[str], columns: Sequence[str], source: str) -> Fault:
    """The fault of several columns, or pairs of them ("a with b"), that fit a role equally well."""
    given = f"{len(found)} that may be the {role}: {', '.join(found)} (columns: {listed(columns)})"
    hint = f'name it: data.columns: {{"{role}": "{found[0].partition(" with ")[0]}"}}'
    return Fault(source, None, None, f"data.columns.{role}", given, "one column", hint)


def check_overrides(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> None:
    """Raises `DataError` for a role or column of `data.columns` that there is not, and a column in two roles.

    overrides: (role, column); None for a role that no column plays.
    """
    taken: dict[str, str] = {}
    for role, column in overrides:
        field = f"data.columns.{role}"
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            raise DataError([Fault(source, None, None, field, shown(role), f"one of {', '.join(roles)}", hint)])
        if column is None:
            continue
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else ""
            wanted = f"one of the columns that are there: {listed(columns)}"
            raise DataError([Fault(source, None, None, field, shown(column), wanted, hint)])
        if column in taken:
            given = f"{shown(column)}, which serves {taken[column]} too"
            raise DataError([Fault(source, None, None, field, given, "a column for each role")])
        taken[column] = role
