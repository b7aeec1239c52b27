"""Find the columns of labeled data (text, text_pair, label) and make `Labeled` examples from rows.

Columns are found by common names, with `data.columns` first; two that fit equally well are an error, because a guess
could train on the wrong one. `labels` decides what a label means. The report states read = used + dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.columns import (
    LABEL_TIERS,
    PAIRS,
    TEXT_TIERS,
    ambiguous,
    candidates,
    listed,
    not_found,
    override_diagnostics,
    plain_name,
    recalled,
    unread,
)
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import Problem, kind_name, shown, structure_of, text_problem, unicode_problem
from loopos.data.rows import Row, RowReader

ROLES = ("text", "text_pair", "label")
VERDICT = "answer"
_VERDICTS = ("accept", "reject", "ignore")
Overrides: TypeAlias = Mapping[str, str] | Mapping[Literal["text", "text_pair", "label"], str]


@dataclass(frozen=True, slots=True)
class LabeledFormat:
    """The column behind each role, and the sentence that says so. `label` is None when there is none to read;
    `verdict`: Prodigy's column `answer`, whose rows are learned where it is "accept".
    """

    text: str
    text_pair: str | None
    label: str | None
    summary: str
    label_required: bool = True
    verdict: str | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """Role → column."""
        served = {"text": self.text, "text_pair": self.text_pair, "label": self.label, "answer": self.verdict}
        return {role: name for role, name in served.items() if name is not None}


@dataclass(frozen=True, slots=True)
class Labeled:
    """One example. `label` is what the file holds (str, int, float, bool or a list); None only when predicting."""

    text: str
    text_pair: str | None
    label: object | None
    row: Row


def detect(
    columns: Sequence[str],
    overrides: Overrides,
    *,
    require_label: bool = True,
    remembered: Mapping[str, str | None] | None = None,
    source: str = "data",
) -> LabeledFormat:
    """Find the column of each role by its name, without regard to case.

    `overrides` (role to column, from `data.columns`) decide; with `text` given, a pair is not guessed. Without
    `require_label` a label is read where there is just one candidate. `remembered`: role to column as the model was
    trained, for roles without an override, if the source has the column. `source` is the name for diagnostics.
    Raises `DataError`: an override that fits no role or column, no candidate for a role, or several.
    """
    overrides = recalled(columns, {str(role): name for role, name in overrides.items()}, remembered or {}, ROLES)
    diagnostics = override_diagnostics(columns, overrides.items(), ROLES, source)
    taken = [column for role, column in overrides.items() if role in ROLES]
    free = [name for name in columns if name not in taken]
    label = overrides.get("label")
    no_label: list[Diagnostic] = []
    if label is None:
        found = candidates(free, LABEL_TIERS)
        label = found[0] if len(found) == 1 else None
        if require_label and label is None:
            no_label = [ambiguous("label", found, columns, source) if found else _no_label(columns, taken, source)]
        free = [name for name in free if name != label]
    text, pair = overrides.get("text"), overrides.get("text_pair")
    if text is None:
        text, pair, diagnostic = _text_columns(free, pair, columns, source)
        diagnostics += [diagnostic] if diagnostic is not None else []
    if diagnostics or no_label:
        raise DataError([*diagnostics, *no_label])
    assert text is not None, "a missing text column is an error"
    served = [("text", text), ("text_pair", pair), ("label", label)]
    summary = "format: labeled (" + ", ".join(f'{role} <- "{name}"' for role, name in served if name is not None) + ")"
    left = unread(columns, (text, pair, label))
    verdict = next((name for name in left if plain_name(name) == VERDICT), None) if require_label else None
    return LabeledFormat(text, pair, label, summary, require_label, verdict)


def to_labeled(row: Row, form: LabeledFormat) -> Labeled:
    """The example that `row` holds. A label string loses the blanks around it; the text stays as it is.

    Raises:
        DataError: blank text, text that is no string, a label that is missing, null, nested or of another type.
    """
    problems = _problems(row, form)
    if problems:
        raise DataError([diagnostic for _, diagnostic in problems])
    return _example(row, form)


def read_labeled(
    reader: RowReader,
    overrides: Overrides,
    require_label: bool = True,
    *,
    remembered: Mapping[str, str | None] | None = None,
) -> tuple[list[Labeled], DataReport]:
    """Read a source into labeled examples, in its order. remembered: as `detect`.

    Raises:
        DataError: as `rows.read` and `detect`; bad rows by the reader's policy, the file's and the format's together.
    """

    def example_of(row: Row, form: LabeledFormat) -> Labeled | Unusable:
        problems = _problems(row, form)
        return Unusable(problems[0][0], [diagnostic for _, diagnostic in problems]) if problems else _example(row, form)

    examples, form, report = read_examples(
        reader,
        lambda columns, source: detect(
            columns, overrides, require_label=require_label, remembered=remembered, source=source
        ),
        example_of,
    )
    names = reader.report.class_names.get(form.label or "", ())
    return _accepted(examples, form, replace(report, class_names=names))


def _accepted(examples: list[Labeled], form: LabeledFormat, report: DataReport) -> tuple[list[Labeled], DataReport]:
    """The examples that an annotator accepted, where the rows are Prodigy's; else all of them."""
    if form.verdict is None:
        return examples, report
    verdicts = [example.row.values.get(form.verdict) for example in examples]
    if not all(isinstance(verdict, str) and verdict in _VERDICTS for verdict in verdicts):
        # A column of that name with other values is none of Prodigy's, and nothing reads it.
        columns = {role: name for role, name in report.columns.items() if name != form.verdict}
        return examples, replace(report, columns=columns, unread=(*report.unread, form.verdict))
    accepted = [example for example, verdict in zip(examples, verdicts, strict=True) if verdict == "accept"]
    counted = Counter(f'"{form.verdict}" is {verdict}' for verdict in verdicts if verdict != "accept")
    if not accepted:
        actual, expected = f"no row whose {shown(form.verdict)} is accept", "at least one accepted row"
        raise DataError([Diagnostic(examples[0].row.source, None, None, form.verdict, actual, expected)])
    return accepted, replace(report, used=len(accepted), dropped={**report.dropped, **counted})


def _example(row: Row, form: LabeledFormat) -> Labeled:
    text, pair = row.values[form.text], row.values[form.text_pair] if form.text_pair is not None else None
    assert isinstance(text, str), "checked by _problems"
    assert pair is None or isinstance(pair, str), "checked by _problems"
    label: object | None = None
    if form.label is not None and (form.label_required or _label_problem(row.values, form.label) is None):
        label = _label_of(row.values[form.label])
    return Labeled(text, pair, label, row)


def _label_of(value: object) -> object:
    """A label as it stands, a text without the blanks around it; a list of classes also as the text that spells it."""
    if not isinstance(value, str):
        return value
    listed = structure_of(value)
    return listed if isinstance(listed, list) else value.strip()


def _pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    named = {plain_name(name): name for name in columns}
    return [(named[first], named[second]) for first, second in PAIRS if first in named and second in named]


def _text_columns(
    free: Sequence[str], pair: str | None, columns: Sequence[str], source: str
) -> tuple[str | None, str | None, Diagnostic | None]:
    """Text column and its partner among the columns that no other role has, or the diagnostic for the choice.

    pair: the partner where `data.columns` names it.
    """
    pairs = [] if pair is not None else _pairs(free)
    best = candidates(free, TEXT_TIERS)
    lone_text = [name for name in best if plain_name(name) == "text" and all(name not in names for names in pairs)]
    if len(pairs) == 1 and not lone_text:
        return *pairs[0], None
    if pairs:
        named = [*lone_text, *(f"{first} with {second}" for first, second in pairs)]
        return None, None, ambiguous("text", named, columns, source)
    if len(best) == 1:
        return best[0], pair, None
    if best:
        return None, None, ambiguous("text", best, columns, source)
    return None, None, not_found("text", columns, TEXT_TIERS, source)


def _no_label(columns: Sequence[str], taken: Sequence[str], source: str) -> Diagnostic:
    """The diagnostic for data without a label column, with a hint on the header if no column name is known."""
    diagnostic = not_found("label", columns, LABEL_TIERS, source)
    looks_named = any(plain_name(name) in tier for name in columns for tier in (*TEXT_TIERS, *LABEL_TIERS))
    if looks_named or set(taken) & set(columns):
        return diagnostic
    return replace(diagnostic, hint="In CSV and TSV the first line must be the header;")


def _problems(row: Row, form: LabeledFormat) -> list[tuple[str, Diagnostic]]:
    """Why a row can't be used: a reason to count, with its diagnostic."""
    found = []
    for role, column in (("text", form.text), ("text_pair", form.text_pair)):
        if column is not None:
            found.append((role, column, _text_problem(row.values, column), "a text that is not blank"))
    if form.label is not None and form.label_required:
        found.append(
            ("label", form.label, _label_problem(row.values, form.label), "a class, a number or a list of classes")
        )
    return [
        (f"{role} {problem[0]}", Diagnostic(row.source_label, row.line, None, column, problem[1], expected, problem[2]))
        for role, column, problem, expected in found
        if problem is not None
    ]


def _text_problem(values: Mapping[str, object], column: str) -> Problem | None:
    return text_problem(values[column]) if column in values else _missing(values)


def _missing(values: Mapping[str, object]) -> Problem:
    return "is missing", f"no such field (fields: {listed(list(values))})", ""


def _label_problem(values: Mapping[str, object], column: str) -> Problem | None:
    if column not in values:
        return _missing(values)
    label = _label_of(values[column])
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
        return "is of the wrong kind", f"{shown(label)} ({kind_name(label)})", ""
    return unicode_problem(label) if isinstance(label, str) else None
