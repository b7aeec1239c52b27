"""The names of columns: how they are compared, and which the user chose.

Enters: the columns of a source and `data.columns`. Leaves: the columns that a role's names fit, faults for a choice
that fits nothing. Left out: which names a role goes by (`column_names`, `supervised_formats`), values (`values`).

The names that columns of labelled data sets usually carry, in lower case with underscores.

Enters: nothing. Leaves: tables for `formats.detect`: a role's names in tiers, a better tier winning over a later one,
and the pairs of names that belong together. Left out: the matching itself.

Columns → one of a family of formats: the one whose roles all have a column.

Enters: names of columns, the user's own choice from `data.columns`, and the `Family` of formats that are looked for.
Leaves: a `Fit`, the format with the column of each of its roles; or a fault, where no format fits or several do, for a
guess could train on the wrong one. Left out: the formats themselves (`supervised_formats`, `preference_formats`), how
names of columns are compared (`columns`).
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


def not_found(role: str, columns: Sequence[str], tiers: Sequence[frozenset[str]], source: str) -> Diagnostic:
    """The fault of a role whose column goes by none of the names in `tiers`."""
    sentence = f"no {role} column found. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, likely(columns, tiers) or COLUMN))
    return Diagnostic(source, None, None, f"data.columns.{role}", sentence, "", "", remedy)


def ambiguous(role: str, found: Sequence[str], columns: Sequence[str], source: str) -> Diagnostic:
    """The fault of several columns, or pairs of them ("a with b"), that fit a role equally well."""
    sentence = f"{len(found)} columns may be the {role}: {', '.join(found)}. Columns: {listed(columns)}"
    remedy = column_remedy(CHOOSE_ONE, (role, found[0].partition(" with ")[0]))
    return Diagnostic(source, None, None, f"data.columns.{role}", sentence, "", "", remedy)


def override_diagnostics(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> list[Diagnostic]:
    """The faults of roles and columns of `data.columns` that are not there, and of a column in two roles.

    overrides: (role, column); None for a role that no column plays.
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
            sentence = f"no column {shown(column)}. Columns: {listed(columns)}"
            diagnostics.append(Diagnostic(source, None, None, field, sentence, "", hint, remedy))
        elif column is not None and column in taken:
            actual = f"{shown(column)}, which serves {taken[column]} too"
            diagnostics.append(Diagnostic(source, None, None, field, actual, "a column for each role"))
        if column is not None:
            taken.setdefault(column, role)
    return diagnostics


def check_overrides(
    columns: Sequence[str], overrides: Iterable[tuple[str, str | None]], roles: Sequence[str], source: str
) -> None:
    """Raises `DataError` with all `override_diagnostics`."""
    diagnostics = override_diagnostics(columns, overrides, roles, source)
    if diagnostics:
        raise DataError(diagnostics)


def _words(name: str) -> list[str]:
    return _WORDS.findall(name.lower())


def _holds(words: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether each of the words asked for begins a word of the column's name."""
    return all(any(word.startswith(part) for word in words) for part in asked)


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
    doubt: Diagnostic | None

    @property
    def summary(self) -> str:
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
    missing = f" (with {', '.join(chosen)} given)" if chosen else ""
    sentence = f"these columns make no known format{missing}: {listed(columns)}. Known: {family.examples}"
    remedy = column_remedy("name the columns", *family.choice)
    raise DataError([Diagnostic(source, None, None, "data.columns", sentence, "", "", remedy)])


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
