"""Columns → one of a family of formats: the one whose roles all have a column.

Enters: names of columns, the user's own choice from `data.columns`, and the `Family` of formats that are looked for.
Leaves: a `Fit`, the format with the column of each of its roles; or a fault, where no format fits or several do, for a
guess could train on the wrong one. Left out: the formats themselves (`supervised_formats`, `preference_formats`), how
names of columns are compared (`columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from loopos.config.faults import DataError, Fault
from loopos.data.columns import CHOOSE_ONE, ambiguous, candidates, check_overrides, column_remedy, listed

Kind = TypeVar("Kind", bound=str)
Overrides: TypeAlias = Mapping[str, str | None]
"""Role → the column that the user chose for it; None: no column plays it."""


@dataclass(frozen=True, slots=True)
class Shape(Generic[Kind]):
    """The roles that a format must have, and may have. `stand_ins`: needed role → the role that will do instead."""

    kind: Kind
    needed: tuple[str, ...]
    more: tuple[str, ...] = ()
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.needed, *self.more)


@dataclass(frozen=True, slots=True)
class Fit(Generic[Kind]):
    """A shape whose columns are there. `columns`: role → column. `doubt`: the fault of the first role with several
    columns that fit equally well, None where there is none.
    """

    shape: Shape[Kind]
    columns: Mapping[str, str]
    doubt: Fault | None

    @property
    def said(self) -> str:
        """The sentence that says format and columns."""
        served = ", ".join(f'{role} <- "{column}"' for role, column in self.columns.items())
        return f"format: {self.shape.kind} ({served})"


@dataclass(frozen=True, slots=True)
class Family(Generic[Kind]):
    """The formats among which one is looked for.

    `names`: role → the names of its column in tiers; `tiers`: the formats. In both a better tier wins over a later one.
    `examples` and `choice`, for the fault where no format fits: columns that would do, and the (role, column) that
    `data.columns` might name. `rivals`, for the fault where several fit: what to call them, and the (role, column) that
    decides.
    """

    names: Mapping[str, tuple[frozenset[str], ...]]
    tiers: tuple[tuple[Shape[Kind], ...], ...]
    examples: str
    choice: tuple[tuple[str, str], ...]
    rivals: Callable[[Sequence[Fit[Kind]]], tuple[str, tuple[str, str]]]


def detected(family: Family[Kind], columns: Sequence[str], overrides: Overrides, source: str) -> Fit[Kind]:
    """Finds the format and the column of each of its roles.

    Args:
        columns: names of the columns that are there.
        overrides: role to column, from `data.columns`; the format is then one that has all these roles. None keeps
            every column out of a role.
        source: the file's name for faults.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    check_overrides(columns, overrides.items(), list(family.names), source)
    names = {role: tiers for role, tiers in family.names.items() if overrides.get(role, "") is not None}
    chosen = {role: column for role, column in overrides.items() if column is not None}
    tiers = [[shape for shape in tier if set(chosen) <= set(shape.roles)] for tier in family.tiers]
    if not any(tiers):
        given = f"the roles {', '.join(chosen)} together"
        wanted = "roles of one format: " + "; ".join(", ".join(shape.roles) for tier in family.tiers for shape in tier)
        raise DataError([Fault(source, None, None, "data.columns", given, wanted)])
    for tier in tiers:
        fits = [fit for shape in tier if (fit := _fit(shape, names, columns, chosen, source)) is not None]
        if len(fits) > 1:
            called, choice = family.rivals(fits)
            given = f"columns of {len(fits)} formats: {called} ({listed(columns)})"
            remedy = column_remedy(CHOOSE_ONE, choice)
            raise DataError([Fault(source, None, None, "data.columns", given, "one format", "", remedy)])
        if fits:
            if fits[0].doubt is not None:
                raise DataError([fits[0].doubt])
            return fits[0]
    missing = f" (with {', '.join(chosen)} given)" if chosen else ""
    sentence = f"these columns make no known format{missing}: {listed(columns)}. Known: {family.examples}"
    remedy = column_remedy("name the columns", *family.choice)
    raise DataError([Fault(source, None, None, "data.columns", sentence, "", "", remedy)])


def _fit(
    shape: Shape[Kind],
    names: Mapping[str, tuple[frozenset[str], ...]],
    columns: Sequence[str],
    overrides: Mapping[str, str],
    source: str,
) -> Fit[Kind] | None:
    """The shape with the column of each role that has one, or None where a needed column is not there."""
    free = [name for name in columns if name not in overrides.values()]
    found = dict(overrides)
    doubt: Fault | None = None
    for role in shape.roles:
        fitting = [] if role in found else candidates(free, names.get(role, ()))
        if len(fitting) > 1 and doubt is None:
            doubt = ambiguous(role, fitting, columns, source)
        if fitting:
            found[role] = fitting[0]
            free.remove(fitting[0])
    if any(role not in found and shape.stand_ins.get(role) not in found for role in shape.needed):
        return None
    return Fit(shape, {role: found[role] for role in shape.roles if role in found}, doubt)
