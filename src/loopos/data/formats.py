"""Rows → labelled examples: which column is the text, which its partner, which the label.

Enters: rows and, from `data.columns`, the user's own choice. Leaves: `Labelled` examples, a sentence that says the
choice, and a report in which read = used + dropped. Columns are found by the names that data sets usually carry; two
that fit equally well are a fault, for a guess could train on the wrong one.
Left out: what a label means (`labels`); tokens (`tokens`).
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from loopos.config.faults import DataError, Fault
from loopos.data.column_names import LABEL_TIERS, PAIRS, TEXT_TIERS
from loopos.data.record import shown
from loopos.data.rows import Row, RowReader

ROLES = ("text", "text_pair", "label")
Overrides: TypeAlias = Mapping[str, str] | Mapping[Literal["text", "text_pair", "label"], str]
UNREADABLE = "unreadable row"


@dataclass(frozen=True, slots=True)
class LabelledFormat:
    """The column behind each role, and the sentence that says so. `label` is None when there is none to read."""

    text: str
    text_pair: str | None
    label: str | None
    said: str
    label_required: bool = True


@dataclass(frozen=True, slots=True)
class Labelled:
    """One example. `label` is what the file holds (str, int, float, bool or a list); None only when predicting."""

    text: str
    text_pair: str | None
    label: object | None
    row: Row


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The account of a pass: `read` = `used` + the sum of `dropped`, which counts the rows dropped for each reason.

    `class_names`: names that the data set itself keeps for the whole numbers of its label column, if any.
    """

    read: int
    used: int
    dropped: dict[str, int]
    said: tuple[str, ...]
    faults: tuple[Fault, ...] = field(default=())
    class_names: tuple[str, ...] = field(default=())


def detect(
    columns: Sequence[str], overrides: Overrides, *, require_label: bool = True, source: str = "data"
) -> LabelledFormat:
    """Finds the column of each role by its name, without regard to case.

    `overrides` (role to column, from `data.columns`) decide; with `text` given, a pair is not guessed. Without
    `require_label` a label is read where there is just one candidate. `source` is the file's name for faults.
    Raises `DataError`: an override that fits no role or column, no candidate for a role, or several.
    """
    _check_overrides(columns, overrides, source)
    free = [name for name in columns if name not in overrides.values()]
    label = overrides.get("label")
    if label is None:
        label = _only("label", _candidates(free, LABEL_TIERS), columns, source, require_label)
        free = [name for name in free if name != label]
    text, pair = overrides.get("text"), overrides.get("text_pair")
    if text is None:
        pairs = [] if pair is not None else _pairs(free)
        best = _candidates(free, TEXT_TIERS)
        lone_text = [name for name in best if _plain(name) == "text" and all(name not in names for names in pairs)]
        if len(pairs) == 1 and not lone_text:
            text, pair = pairs[0]
        elif pairs:
            raise _ambiguous(
                "text", [*lone_text, *(f"{first} with {second}" for first, second in pairs)], columns, source
            )
        else:
            text = _only("text", best, columns, source, True)
    assert text is not None, "a text column is required of `_only`"
    served = [("text", text), ("text_pair", pair), ("label", label)]
    said = "format: labelled (" + ", ".join(f'{role} <- "{name}"' for role, name in served if name is not None) + ")"
    return LabelledFormat(text, pair, label, said, require_label)


def to_labelled(row: Row, form: LabelledFormat) -> Labelled:
    """The example that `row` holds. A label string loses the blanks around it; the text stays as it is.

    Raises:
        DataError: blank text, text that is no string, a label that is missing, null, nested or of another type.
    """
    problems = _problems(row, form)
    if problems:
        raise DataError([fault for _, fault in problems])
    return _example(row, form)


def read_labelled(
    reader: RowReader, overrides: Overrides, require_label: bool = True
) -> tuple[list[Labelled], FormatReport]:
    """Reads a whole source into labelled examples, in its order.

    Raises:
        DataError: as `rows.read` and `detect`; bad rows by the reader's policy, the file's and the format's together.
    """
    rows = list(reader.rows())
    report = reader.report
    dropped = Counter({UNREADABLE: report.bad_rows} if report.bad_rows else {})
    examples: list[Labelled] = []
    said = report.said
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row.values))
        try:
            form = detect(columns, overrides, require_label=require_label, source=rows[0].source)
        except DataError as error:
            raise DataError([*error.faults, *(report.faults if reader.on_bad_row == "error" else [])]) from error
        said = [*said, form.said]
        for row in rows:
            problems = _problems(row, form)
            if problems:
                dropped[problems[0][0]] += 1
                reader.reject([fault for _, fault in problems])
            else:
                examples.append(_example(row, form))
    reader.finish()
    if not examples:
        given = f"{report.rows_read} rows, none of which can be used"
        first = f"the first fault: {report.faults[0]}" if report.faults else ""
        raise DataError([Fault(report.source, None, None, "rows", given, "at least one good row", first)])
    names = report.class_names.get(form.label or "", ())
    account = FormatReport(report.rows_read, len(examples), dict(dropped), tuple(said), tuple(report.faults), names)
    assert account.read == account.used + sum(account.dropped.values()), account
    return examples, account


def _example(row: Row, form: LabelledFormat) -> Labelled:
    text, pair = row.values[form.text], row.values[form.text_pair] if form.text_pair is not None else None
    assert isinstance(text, str), "checked by _problems"
    assert pair is None or isinstance(pair, str), "checked by _problems"
    label: object | None = None
    if form.label is not None and (form.label_required or _label_problem(row.values, form.label) is None):
        label = row.values[form.label]
    return Labelled(text, pair, label.strip() if isinstance(label, str) else label, row)


def _check_overrides(columns: Sequence[str], overrides: Overrides, source: str) -> None:
    for role, column in overrides.items():
        field = f"data.columns.{role}"
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            raise DataError([Fault(source, None, None, field, shown(role), f"one of {', '.join(ROLES)}", hint)])
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else ""
            wanted = f"one of the columns that are there: {_listed(columns)}"
            raise DataError([Fault(source, None, None, field, shown(column), wanted, hint)])
        doubled = next((other for other, taken in overrides.items() if other != role and taken == column), None)
        if doubled is not None:
            wanted = "a column for each role"
            given = f"{shown(column)}, which serves {doubled} too"
            raise DataError([Fault(source, None, None, field, given, wanted)])


def _candidates(columns: Sequence[str], tiers: Sequence[frozenset[str]]) -> list[str]:
    """The columns named in the first tier that names any."""
    for tier in tiers:
        found = [name for name in columns if _plain(name) in tier]
        if found:
            return found
    return []


def _pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    named = {_plain(name): name for name in columns}
    return [(named[first], named[second]) for first, second in PAIRS if first in named and second in named]


def _only(role: str, candidates: Sequence[str], columns: Sequence[str], source: str, required: bool) -> str | None:
    if len(candidates) == 1:
        return candidates[0]
    if not required:
        return None
    if candidates:
        raise _ambiguous(role, candidates, columns, source)
    given = f"no column that is known as a {role}; there: {_listed(columns)}"
    hint = f'name it: data.columns: {{"{role}": "COLUMN"}}'
    if role == "label":
        hint += ". In CSV and TSV the first line must be the header"
    raise DataError([Fault(source, None, None, f"data.columns.{role}", given, f"a column such as {role}", hint)])


def _ambiguous(role: str, candidates: Sequence[str], columns: Sequence[str], source: str) -> DataError:
    given = f"{len(candidates)} that may be the {role}: {', '.join(candidates)} (columns: {_listed(columns)})"
    hint = f'name it: data.columns: {{"{role}": "{candidates[0].partition(" with ")[0]}"}}'
    return DataError([Fault(source, None, None, f"data.columns.{role}", given, "one column", hint)])


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"


def _problems(row: Row, form: LabelledFormat) -> list[tuple[str, Fault]]:
    """Why a row can't be used: a reason to count, with its fault."""
    found = []
    for role, column in (("text", form.text), ("text_pair", form.text_pair)):
        if column is not None:
            found.append((role, column, _text_problem(row.values, column), "a text that is not blank"))
    if form.label is not None and form.label_required:
        found.append(
            ("label", form.label, _label_problem(row.values, form.label), "a class, a number or a list of classes")
        )
    return [
        (f"{role} {problem[0]}", Fault(row.place, row.line, None, column, problem[1], wanted, problem[2]))
        for role, column, problem, wanted in found
        if problem is not None
    ]


def _text_problem(values: Mapping[str, object], column: str) -> tuple[str, str, str] | None:
    if column not in values:
        return "is missing", f"no such field (there: {_listed(list(values))})", ""
    text = values[column]
    if text is None:
        return "is null", "null", ""
    if not isinstance(text, str):
        return (
            "is not a string",
            f"{shown(text)} ({_kind(text)})",
            "put it into double quotes" if _is_number(text) else "",
        )
    if not text.strip():
        return "is blank", shown(text), ""
    if not _is_unicode(text):
        return "is not Unicode", f"{shown(text)}, with half of a surrogate pair", r"a pair such as \ud83d\ude00 was cut"
    return None


def _label_problem(values: Mapping[str, object], column: str) -> tuple[str, str, str] | None:
    if column not in values:
        return "is missing", f"no such field (there: {_listed(list(values))})", ""
    label = values[column]
    if label is None or (isinstance(label, str) and not label.strip()):
        return "is null", "null" if label is None else f"an empty label ({shown(label)})", ""
    if isinstance(label, list):
        wrong = [item for item in label if not isinstance(item, str | int) or isinstance(item, bool)]
        if wrong:
            nested = isinstance(wrong[0], list | dict)
            hint = "" if nested else "list the names or numbers of the classes that apply"
            return ("is nested" if nested else "is of the wrong kind"), f"a list that holds {shown(wrong[0])}", hint
        return None
    if isinstance(label, dict):
        return "is nested", f"an object: {shown(label)}", "name a column that holds the label itself"
    if isinstance(label, float) and not math.isfinite(label):
        return "is not finite", str(label), ""
    if not isinstance(label, str | int | float):
        return "is of the wrong kind", f"{shown(label)} ({_kind(label)})", ""
    if isinstance(label, str) and not _is_unicode(label):
        return "is not Unicode", f"{shown(label)}, with half of a surrogate pair", ""
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
