"""Find the format of a data set and the column of each role by the columns' names.

Names are compared without regard to case, blanks and dashes, with `data.columns` first. A format fits if each of its
roles has a column; if no format or several fit, the error names the candidates, because a guess could train on the
wrong column.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from loopos.config.diagnostics import DataError, Diagnostic, Remedy
from loopos.data.record import shown

COLUMN = "COLUMN"
"""Placeholder for a column name that cannot be guessed."""
CHOOSE_ONE = "choose one"
# A column called "text,label" is two columns that were not split.
_DELIMITERS = frozenset(",;\t|")
_IN_COLUMN = re.compile(r"[.\[]")
_NAME_PARTS = re.compile(r"[^\W_]+")


def plain_name(name: str) -> str:
    """A column name in lower case, with underscores for blanks and dashes."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def listed(columns: Sequence[str]) -> str:
    """At most twenty column names for a message."""
    return ", ".join(shown(name) for name in columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"


def recalled(
    columns: Sequence[str], overrides: Mapping[str, str], remembered: Mapping[str, str | None], roles: Iterable[str]
) -> dict[str, str]:
    """`overrides` (role → column), and for other `roles` the column `remembered` from training, if it exists and is
    free.
    """
    taken = set(overrides.values())
    found = ((role, remembered.get(role)) for role in roles)
    from_training = {role: name for role, name in found if name is not None and name in columns and name not in taken}
    return {**from_training, **overrides}


def roles_summary(kind: str, columns: Mapping[str, str]) -> str:
    """A format and the column of each of its roles as text."""
    served = ", ".join(f'{role} <- "{column}"' for role, column in columns.items())
    return f"{kind} ({served})"


def unread(columns: Sequence[str], read: Iterable[str | None]) -> tuple[str, ...]:
    """The columns that no role reads; `input.messages` and `completions[].score` are read from columns too."""
    taken = {part for name in read if name is not None for part in (name, _IN_COLUMN.split(name, maxsplit=1)[0])}
    return tuple(name for name in columns if name not in taken)


def named(columns: Sequence[str]) -> str:
    """At most twenty column names for a sentence, quoted where a bare name could be misread."""
    names = [
        name if name.isprintable() and name.strip() == name and "," not in name else shown(name) for name in columns
    ]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def candidates(columns: Sequence[str], tiers: Sequence[frozenset[str]]) -> list[str]:
    """The columns in the first tier that matches any."""
    return next((found for tier in tiers if (found := [name for name in columns if plain_name(name) in tier])), [])


def closest(name: str, columns: Sequence[str]) -> str | None:
    """The column closest to `name`: equal apart from case, blanks and dashes; the only one whose parts start with the
    parts of `name`; or the one with the most similar spelling. None if there is none.
    """
    plain = {plain_name(column): column for column in reversed(columns)}
    if plain_name(name) in plain:
        return plain[plain_name(name)]
    requested = _name_parts(name)
    if requested:
        holding = [column for column in columns if _matches_parts(_name_parts(column), requested)]
        if len(holding) == 1:
            return holding[0]
    near = difflib.get_close_matches(plain_name(name), list(plain), n=1)
    return plain[near[0]] if near else None


def likely(columns: Sequence[str], tiers: Sequence[frozenset[str]]) -> str | None:
    """The only column with a part in the first tier that matches any column."""
    for tier in tiers:
        found = [
            column for column in columns if tier.intersection(_name_parts(column)) and not set(column) & _DELIMITERS
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def column_remedy(lead: str, *roles: tuple[str, str]) -> Remedy:
    """The remedy that sets the column of each role; `roles` are (role, column)."""
    return Remedy(lead, tuple((f"data.columns.{role}", column) for role, column in roles))


def not_found(role: str, columns: Sequence[str], tiers: Sequence[frozenset[str]], source: str) -> Diagnostic:
    """The diagnostic for a role without a column named in `tiers`."""
    message = f"no {role} column found. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, likely(columns, tiers) or COLUMN))
    return Diagnostic(source, None, None, f"data.columns.{role}", message, "", "", remedy)


def ambiguous(role: str, found: Sequence[str], columns: Sequence[str], source: str) -> Diagnostic:
    """The diagnostic for several columns, or pairs ("a with b"), that fit a role equally well."""
    message = f"{len(found)} columns may be the {role}: {', '.join(found)}. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, found[0].partition(" with ")[0]))
    return Diagnostic(source, None, None, f"data.columns.{role}", message, "", "", remedy)


def override_diagnostics(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> list[Diagnostic]:
    """Diagnostics for unknown roles and columns in `data.columns`, and for a column with two roles.

    `overrides` are (role, column); None for a role without a column.
    """
    taken: dict[str, str] = {}
    diagnostics: list[Diagnostic] = []
    for role, column in overrides:
        field = f"data.columns.{role}"
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            diagnostics.append(Diagnostic(source, None, None, field, shown(role), f"one of {', '.join(roles)}", hint))
        elif column is not None and column not in columns:
            near_column = closest(column, columns)
            hint = f"did you mean {json.dumps(near_column, ensure_ascii=False)}?" if near_column is not None else ""
            remedy = column_remedy("set", (role, near_column)) if near_column is not None else None
            message = f"no column {shown(column)}. Columns: {listed(columns)}"
            diagnostics.append(Diagnostic(source, None, None, field, message, "", hint, remedy))
        elif column is not None and column in taken:
            actual = f"{shown(column)}, which also has the role {taken[column]}"
            diagnostics.append(Diagnostic(source, None, None, field, actual, "one column per role"))
        if column is not None:
            taken.setdefault(column, role)
    return diagnostics


def check_overrides(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> None:
    """Raise `DataError` with all `override_diagnostics`."""
    diagnostics = override_diagnostics(columns, overrides, roles, source)
    if diagnostics:
        raise DataError(diagnostics)


def _name_parts(name: str) -> list[str]:
    return _NAME_PARTS.findall(name.lower())


def _matches_parts(parts: Sequence[str], requested: Sequence[str]) -> bool:
    """Whether each requested part starts a part of the column's name."""
    return all(any(part.startswith(start) for part in parts) for start in requested)


TEXT_TIERS: tuple[frozenset[str], ...] = (
    frozenset({"text"}),
    frozenset({
        "sentence", "content", "review", "message", "comment", "document", "body", "utterance", "tweet", "post",
        "passage", "abstract", "description", "sms", "email", "texts", "sentences", "review_text", "review_body",
        "review_content", "reviewtext", "comment_text", "message_text", "tweet_text", "full_text", "question_text",
        "text_a", "text1", "sentence1", "input_text", "article", "statement", "claim", "dialogue", "transcript",
        "transcription", "feedback", "complaint", "news",
    }),
    frozenset({"question", "query", "input", "title", "headline", "subject", "prompt", "premise", "problem"}),
)  # fmt: skip

PAIRS: tuple[tuple[str, str], ...] = (
    ("text", "text_pair"), ("text", "text2"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"),
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("sent1", "sent2"),
    ("s1", "s2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "answer"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"), ("query", "document"),
    ("query", "passage"), ("query", "text"), ("claim", "evidence"),
)  # fmt: skip

LABEL_TIERS: tuple[frozenset[str], ...] = (
    frozenset({"label", "labels"}),
    frozenset({
        "target", "targets", "class", "classes", "category", "categories", "intent", "intents", "sentiment", "rating",
        "ratings", "score", "scores", "stars", "star", "star_rating", "emotion", "emotions", "topic", "topics", "y",
        "gold", "gold_label", "polarity", "toxicity", "tag", "tags", "genre", "fine_label", "coarse_label", "label_id",
        "label_idx", "label_text", "label_name", "similarity", "similarity_score", "relatedness_score",
        "airline_sentiment", "grade", "value", "outcome", "is_duplicate", "entailment", "spam", "toxic",
    }),
)  # fmt: skip


Kind = TypeVar("Kind", bound=str)
Overrides: TypeAlias = Mapping[str, str | None]
"""Role → column chosen by the user; None for no column."""


@dataclass(frozen=True, slots=True)
class Shape(Generic[Kind]):
    """Required and optional roles of a format. `stand_ins`: required role → role that can replace it."""

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
    """A format whose columns exist. `columns`: role → column. `doubt`: the diagnostic for the first ambiguous role."""

    shape: Shape[Kind]
    columns: Mapping[str, str]
    doubt: Diagnostic | None

    @property
    def summary(self) -> str:
        """Format and columns as text."""
        return f"format: {roles_summary(self.shape.kind, self.columns)}"


@dataclass(frozen=True, slots=True)
class Family(Generic[Kind]):
    """A set of formats to choose from.

    `names`: role → tiers of column names; `tiers`: tiers of formats; an earlier tier wins. `examples` and `choice` are
    for the error if no format fits: example columns, and the (role, column) to set in `data.columns`. `rivals` is for
    the error if several fit: their names, and the (role, column) that decides.
    """

    names: Mapping[str, tuple[frozenset[str], ...]]
    tiers: tuple[tuple[Shape[Kind], ...], ...]
    examples: str
    choice: tuple[tuple[str, str], ...]
    rivals: Callable[[Sequence[Fit[Kind]]], tuple[str, tuple[str, str]]]


def detected(family: Family[Kind], columns: Sequence[str], overrides: Overrides, source: str) -> Fit[Kind]:
    """Find the format and the column of each of its roles.

    Args:
        columns: names of the existing columns.
        overrides: role to column, from `data.columns`; the format must have all these roles. None leaves a role without
            a column.
        source: the file's name for diagnostics.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    check_overrides(columns, overrides.items(), list(family.names), source)
    names = {role: tiers for role, tiers in family.names.items() if overrides.get(role, "") is not None}
    chosen = {role: column for role, column in overrides.items() if column is not None}
    tiers = [[shape for shape in tier if set(chosen) <= set(shape.roles)] for tier in family.tiers]
    if not any(tiers):
        actual = f"the roles {', '.join(chosen)} together"
        expected = "roles of one format: " + "; ".join(
            ", ".join(shape.roles) for tier in family.tiers for shape in tier
        )
        raise DataError([Diagnostic(source, None, None, "data.columns", actual, expected)])
    for tier in tiers:
        fits = [fit for shape in tier if (fit := _fit(shape, names, columns, chosen, source)) is not None]
        if len(fits) > 1:
            called, choice = family.rivals(fits)
            actual = f"columns of {len(fits)} formats: {called} ({listed(columns)})"
            remedy = column_remedy(CHOOSE_ONE, choice)
            raise DataError([Diagnostic(source, None, None, "data.columns", actual, "one format", "", remedy)])
        if fits:
            if fits[0].doubt is not None:
                raise DataError([fits[0].doubt])
            return fits[0]
    missing = f" (with {', '.join(chosen)} set)" if chosen else ""
    message = f"these columns make no known format{missing}: {listed(columns)}. Known: {family.examples}"
    remedy = column_remedy("name the columns", *family.choice)
    raise DataError([Diagnostic(source, None, None, "data.columns", message, "", "", remedy)])


def _fit(
    shape: Shape[Kind],
    names: Mapping[str, tuple[frozenset[str], ...]],
    columns: Sequence[str],
    overrides: Mapping[str, str],
    source: str,
) -> Fit[Kind] | None:
    """The format with the column of each role, or None if a required column is missing."""
    free = [name for name in columns if name not in overrides.values()]
    found = dict(overrides)
    doubt: Diagnostic | None = None
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
