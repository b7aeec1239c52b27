"""Label Studio's JSON export → flat rows.

Enters: rows as a reader gives them. Leaves: the same rows, or, for an export (columns `data` and `annotations`), rows
with the fields of `data` and, under the name of each control, what the annotators chose: the side of a pairwise
comparison, the choices of a classification, a rating, a number. Several annotators' answers are a list. Left out: what
a column means (`formats`, `preferences`), spans, boxes and other controls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loopos.data.rows import Row

PAIRWISE = "preference"
"""The column of a pairwise comparison, whatever its control is called."""


def flat_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of an export made flat; other rows as they are."""
    if not rows or not all(_is_task(row) for row in rows):
        return list(rows)
    return [replace(row, values={**_fields(row), **_answers(row)}) for row in rows]


def _is_task(row: Row) -> bool:
    data, annotations = row.values.get("data"), row.values.get("annotations")
    return isinstance(data, dict) and isinstance(annotations, list)


def _fields(row: Row) -> dict[str, object]:
    data = row.values["data"]
    assert isinstance(data, dict)
    return dict(data)


def _answers(row: Row) -> dict[str, object]:
    """What the annotators answered, by control; those who skipped the task answered nothing."""
    found: dict[str, list[object]] = defaultdict(list)
    annotations = row.values["annotations"]
    assert isinstance(annotations, list)
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        for result in annotation.get("result") or []:
            if isinstance(result, dict) and isinstance(result.get("value"), dict):
                name, answer = _answer(result)
                if answer is not None:
                    found[name].append(answer)
    return {name: answers[0] if len(answers) == 1 else answers for name, answers in found.items()}


def _answer(result: dict[str, Any]) -> tuple[str, object]:
    """The column and the value of one result; None for a control that gives no label."""
    value, name = result["value"], str(result.get("from_name", "label"))
    match result.get("type"):
        case "pairwise":
            return PAIRWISE, value.get("selected")
        case "choices":
            choices = value.get("choices")
            return name, choices[0] if isinstance(choices, list) and len(choices) == 1 else choices
        case "rating":
            return name, value.get("rating")
        case "number":
            return name, value.get("number")
        case _:
            return name, None
