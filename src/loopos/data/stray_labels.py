"""Labels that do not belong to the others of their column: an "N/A" among numbers, numbers with a decimal comma.

Enters: labelled examples and the kinds of their labels. Leaves: the strays, which are faults or, where bad rows are
skipped, rows to leave out. Left out: the task and its classes (`labels`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from loopos.config.faults import Fault
from loopos.data.formats import Labelled
from loopos.data.label_space import Kind, is_comma_number, kind_of, sole
from loopos.data.record import shown

FEW = 4
"""So many labels of one kind for each of another make the other ones strays."""
_MANY_NUMBERS = 20
_NUMBERS = frozenset[Kind]({"whole number", "number"})
_MISSING = frozenset({
    "", "-", "--", "?", ".", "n/a", "na", "nan", "null", "none", "nil", "inf", "-inf", "+inf", "infinity", "-infinity",
    "missing", "unknown", "undefined", "#n/a", "#na", "#div/0!", "#value!", "#ref!",
})  # fmt: skip
"""What tables write where a number is missing, in lower case."""


def texts_among_numbers(
    examples: Sequence[Labelled], num_classes: int | None, class_names: Sequence[str] | None
) -> list[Labelled]:
    """The few labels that are text where the others, also as text, are numbers; none where numbers may be names.

    The numbers are taken for such if one has a fraction, if more than 20 are different, if the texts are what tables
    write for a missing number, or if the config counts or names the classes that the numbers stand for.
    """
    names = class_names or ()
    texts = [example for example in examples if kind_of(example.label) == "text" and example.label not in names]
    numbers = [example for example in examples if kind_of(example.label) in _NUMBERS]
    if not texts or len(numbers) < FEW * len(texts) or len(numbers) + len(texts) < len(examples):
        return []
    measures = any(kind_of(example.label) == "number" for example in numbers)
    many = len({str(example.label) for example in numbers}) > _MANY_NUMBERS
    missing = all(str(example.label).lower() in _MISSING for example in texts)
    are_counted = num_classes is not None or (bool(names) and not any(kind_of(name) in _NUMBERS for name in names))
    return texts if measures or many or missing or are_counted else []


def of_other_kinds(examples: Sequence[Labelled], *, is_class: bool) -> list[Labelled]:
    """The labels of other kinds than most are of; none where no kind has so many. is_class: a list of one label is that
    label.
    """
    groups: dict[str, list[Labelled]] = defaultdict(list)
    for example in examples:
        kind = kind_of(sole(example.label) if is_class else example.label)
        groups["number" if kind in _NUMBERS else str(kind)].append(example)
    largest = max(groups.values(), key=len)
    if len(largest) < FEW * (len(examples) - len(largest)):
        return []
    return [example for group in groups.values() if group is not largest for example in group]


def commas(examples: Sequence[Labelled]) -> list[Labelled]:
    """The labels that are numbers with a decimal comma, if all are that or whole numbers."""
    found = [example for example in examples if is_comma_number(example.label)]
    others = len(examples) - len(found)
    whole = sum(kind_of(example.label) == "whole number" for example in examples)
    return found if others == whole else []


def stray_fault(example: Labelled, column: str) -> Fault:
    """The fault of a text among numbers."""
    wanted = "a number, as the other rows have"
    hint = (
        'correct or remove the row, set data.on_bad_row to skip, or set model.task to "classification" to learn every '
        "label as a class"
    )
    row, label = example.row, example.label
    hint = f"write {label.replace(',', '.')}, with a point" if is_comma_number(label) else hint
    return Fault(row.place, row.line, None, column, shown(label), wanted, hint)


def comma_fault(example: Labelled, column: str) -> Fault:
    """The fault of a number with a decimal comma."""
    row = example.row
    assert isinstance(example.label, str)
    point, bars = example.label.replace(",", "."), example.label.replace(",", "|")
    hint = (
        f'write {point} for a number, {bars} with model.task "multi_label" for two classes, or set model.task to '
        '"classification" to learn it as it stands'
    )
    return Fault(
        row.place, row.line, None, column, f"{shown(example.label)}, with a comma", "a class or a number", hint
    )
