"""The names of columns: how they are compared, and which the user chose.

Enters: the columns of a source and `data.columns`. Leaves: the columns that a role's names fit, faults for a choice
that fits nothing. Left out: which names a role goes by (`column_names`, `supervised_formats`), values (`values`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from loopos.config.faults import DataError, Fault, Remedy
from loopos.data.record import shown

COLUMN = "COLUMN"
"""What stands for the column's name where it cannot be guessed."""
CHOOSE_ONE = "choose one"
# A column called "text,label" is two that were not parted.
_DELIMITERS = frozenset(",;\t|")
_WORDS = re.compile(r"[^\W_]+")


def plain_name(name: str) -> str:
    """A column's name without regard to case, blanks and dashes."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def listed(columns: Sequence[str]) -> str:
    """The names of columns for a message, twenty at most."""
    return ", ".join(shown(name) for name in columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"


def recalled(
    columns: Sequence[str], overrides: Mapping[str, str], remembered: Mapping[str, str | None], roles: Iterable[str]
) -> dict[str, str]:
    """`overrides` (role → column), and for other `roles` the column that is `remembered` from training, where the
    source has it and no override takes it.
    """
    taken = set(overrides.values())
    found = ((role, remembered.get(role)) for role in roles)
    kept = {role: name for role, name in found if name is not None and name in columns and name not in taken}
    return {**kept, **overrides}


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


def closest(name: str, columns: Sequence[str]) -> str | None:
    """The column that `name` may have meant: the same but for case, blanks and dashes; the only one whose words begin
    with those of `name`; or the one spelled most like it. None where there is none.
    """
    plain = {plain_name(column): column for column in reversed(columns)}
    if plain_name(name) in plain:
        return plain[plain_name(name)]
    asked = _words(name)
    if asked:
        holding = [column for column in columns if _holds(_words(column), asked)]
        if len(holding) == 1:
            return holding[0]
    near = difflib.get_close_matches(plain_name(name), list(plain), n=1)
    return plain[near[0]] if near else None


def likely(columns: Sequence[str], tiers: Sequence[frozenset[str]]) -> str | None:
    """The only column one of whose words is a name in the first tier that any column has such a word of."""
    for tier in tiers:
        found = [column for column in columns if tier.intersection(_words(column)) and not set(column) & _DELIMITERS]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def column_remedy(lead: str, *roles: tuple[str, str]) -> Remedy:
    """The remedy that names the column of each role. roles: (role, column)."""
    return Remedy(lead, tuple((f"data.columns.{role}", column) for role, column in roles))


def not_found(role: str, columns: Sequence[str], tiers: Sequence[frozenset[str]], source: str) -> Fault:
    """The fault of a role whose column goes by none of the names in `tiers`."""
    sentence = f"no {role} column found. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, likely(columns, tiers) or COLUMN))
    return Fault(source, None, None, f"data.columns.{role}", sentence, "", "", remedy)


def ambiguous(role: str, found: Sequence[str], columns: Sequence[str], source: str) -> Fault:
    """The fault of several columns, or pairs of them ("a with b"), that fit a role equally well."""
    sentence = f"{len(found)} columns may be the {role}: {', '.join(found)}. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, found[0].partition(" with ")[0]))
    return Fault(source, None, None, f"data.columns.{role}", sentence, "", "", remedy)


def override_faults(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> list[Fault]:
    """The faults of roles and columns of `data.columns` that are not there, and of a column in two roles.

    overrides: (role, column); None for a role that no column plays.
    """
    taken: dict[str, str] = {}
    faults: list[Fault] = []
    for role, column in overrides:
        field = f"data.columns.{role}"
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            faults.append(Fault(source, None, None, field, shown(role), f"one of {', '.join(roles)}", hint))
        elif column is not None and column not in columns:
            near_column = closest(column, columns)
            hint = f"did you mean {json.dumps(near_column, ensure_ascii=False)}?" if near_column is not None else ""
            remedy = column_remedy("set", (role, near_column)) if near_column is not None else None
            sentence = f"no column {shown(column)}. Columns: {listed(columns)}"
            faults.append(Fault(source, None, None, field, sentence, "", hint, remedy))
        elif column is not None and column in taken:
            given = f"{shown(column)}, which serves {taken[column]} too"
            faults.append(Fault(source, None, None, field, given, "a column for each role"))
        if column is not None:
            taken.setdefault(column, role)
    return faults


def check_overrides(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> None:
    """Raises `DataError` with all `override_faults`."""
    faults = override_faults(columns, overrides, roles, source)
    if faults:
        raise DataError(faults)


def _words(name: str) -> list[str]:
    return _WORDS.findall(name.lower())


def _holds(words: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether each of the words asked for begins a word of the column's name."""
    return all(any(word.startswith(part) for word in words) for part in asked)
