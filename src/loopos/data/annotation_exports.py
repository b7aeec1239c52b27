"""Exports of annotation tools as flat rows: Label Studio's tasks and Argilla's records.

Label Studio (JSON): a row gets the fields of `data` and, under the name of each control, the annotators' choices
(pairwise, choices, rating, number); other controls are left out. Argilla (`records.to_json`, and `FeedbackDataset` of
version 1): a row gets its `metadata` and `fields`, `QUESTION.responses` with a value for each annotator, and
`QUESTION.suggestion`; these are the names of Argilla's own flat export (`records.to_datasets`), whose discarded answers
are left out. Apart from `reading`, because the checks before training and `data check` look at the same flat rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loopos.data.rows import Row

PAIRWISE = "preference"
"""The column of a pairwise comparison, for any name of its control."""

_RESPONSES, _STATUS, _SUGGESTION = ".responses", ".responses.status", ".suggestion"
_DISCARDED = frozenset({"discarded", "draft", "missing"})


def flat_rows(rows: Sequence[Row]) -> list[Row]:
    """Flatten the rows of an export; other rows are returned unchanged."""
    if rows and all(_is_task(row.values) for row in rows):
        return [replace(row, values={**_object(row.values["data"]), **_answers(row.values)}) for row in rows]
    if rows and all(_is_record(row.values) for row in rows):
        return [replace(row, values=_flat_record(row.values)) for row in rows]
    return [replace(row, values=_without_discarded(row.values)) if _has_answers(row.values) else row for row in rows]


def submitted(answers: Sequence[object]) -> list[object]:
    """Answers of several people without those that they discarded or did not submit (Argilla's `status`)."""
    return [each for each in answers if not (isinstance(each, dict) and each.get("status") in _DISCARDED)]


def _is_task(values: Mapping[str, object]) -> bool:
    return isinstance(values.get("data"), dict) and isinstance(values.get("annotations"), list)


def _is_record(values: Mapping[str, object]) -> bool:
    answers = [values[name] for name in ("responses", "suggestions") if name in values]
    return (
        isinstance(values.get("fields"), dict)
        and bool(answers)
        and all(isinstance(each, dict | list) for each in answers)
    )


def _has_answers(values: Mapping[str, object]) -> bool:
    return any(name.endswith((_STATUS, _SUGGESTION)) for name in values)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[dict[str, Any]]:
    """The objects in a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _answers(values: Mapping[str, object]) -> dict[str, object]:
    """The annotators' answers of a task by control, without cancelled annotations."""
    found: dict[str, list[object]] = defaultdict(list)
    for annotation in _items(values["annotations"]):
        if annotation.get("was_cancelled"):
            continue
        for result in _items(annotation.get("result")):
            if isinstance(result.get("value"), dict):
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


def _flat_record(values: Mapping[str, object]) -> dict[str, object]:
    """The columns of one record of Argilla, of version 2 or 1."""
    answers: dict[str, list[object]] = defaultdict(list)
    responses, suggestions = values.get("responses"), values.get("suggestions")
    for question, users in _object(responses).items():
        answers[question] += [_object(each).get("value") for each in submitted(_items(users))]
    for user in submitted(_items(responses)):
        for question, answer in _object(_object(user).get("values")).items():
            answers[question].append(_object(answer).get("value"))
    proposed = {question: _object(each).get("value") for question, each in _object(suggestions).items()}
    proposed |= {str(each.get("question_name")): each.get("value") for each in _items(suggestions)}
    return {
        **_object(values.get("metadata")),
        **_object(values["fields"]),
        **{f"{question}{_RESPONSES}": found for question, found in answers.items()},
        **{f"{question}{_SUGGESTION}": _one(found) for question, found in proposed.items()},
    }


def _without_discarded(values: Mapping[str, object]) -> dict[str, object]:
    """A flat record of Argilla without the answers that annotators discarded or did not submit."""
    found = dict(values)
    for name, value in values.items():
        question = name.removesuffix(_STATUS)
        answers = values.get(f"{question}{_RESPONSES}")
        if name.endswith(_STATUS) and isinstance(value, list) and isinstance(answers, list):
            both = zip(answers, value, strict=True) if len(answers) == len(value) else ((each, "") for each in answers)
            found[f"{question}{_RESPONSES}"] = [each for each, status in both if status not in _DISCARDED]
        elif name.endswith(_SUGGESTION):
            found[name] = _one(value)
    return found


def _one(value: object) -> object:
    """A suggestion as one answer: a ranking, which is a list, is not the answers of several people."""
    return [value] if isinstance(value, list) else value
