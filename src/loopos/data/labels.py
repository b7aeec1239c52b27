"""Infer the task and the classes of a data set from all its labels (`infer_task` → `LabelSpace`).

Without a task in the config, whole numbers, text and true/false mean classification, numbers with a fraction
regression, lists multi_label. Whole-number classes are 0 to n - 1 if num_classes is set or the numbers are consecutive
from 0, else the distinct numbers in order; text classes are the distinct values, sorted. Stray labels ("N/A" among
numbers, decimal commas) are errors, or skipped with `on_bad_row: skip`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.data.formats import Labeled
from loopos.data.label_space import (
    Kind,
    LabelSpace,
    Task,
    is_comma_number,
    key_of,
    kind_of,
    label_error,
    members_of,
    sole,
)
from loopos.data.record import MAXIMUM_DIAGNOSTICS, BadRows, shown

FEW = 4
"""With at least this many labels of one kind for each label of another kind, the others are strays."""
_MANY_NUMBERS = 20
_NUMBERS = frozenset[Kind]({"whole number", "number"})
_MISSING = frozenset({
    "", "-", "--", "?", ".", "n/a", "na", "nan", "null", "none", "nil", "inf", "-inf", "+inf", "infinity", "-infinity",
    "missing", "unknown", "undefined", "#n/a", "#na", "#div/0!", "#value!", "#ref!",
})  # fmt: skip
"""Spellings of a missing number in tables, in lower case."""


def texts_among_numbers(
    examples: Sequence[Labeled], num_classes: int | None, class_names: Sequence[str] | None
) -> list[Labeled]:
    """The few text labels among numbers (which may be spelled as text); empty if the numbers may be class names.

    They count as numbers if one has a fraction, if more than 20 differ, if the texts are spellings of a missing number,
    or if the config sets the number or the names of the classes.
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


def labels_of_other_kinds(examples: Sequence[Labeled], *, is_class: bool) -> list[Labeled]:
    """The labels that are not of the dominant kind; empty if no kind dominates.

    `is_class`: a list of one label counts as that label.
    """
    groups: dict[str, list[Labeled]] = defaultdict(list)
    for example in examples:
        kind = kind_of(sole(example.label) if is_class else example.label)
        groups["number" if kind in _NUMBERS else str(kind)].append(example)
    largest = max(groups.values(), key=len)
    if len(largest) < FEW * (len(examples) - len(largest)):
        return []
    return [example for group in groups.values() if group is not largest for example in group]


def commas(examples: Sequence[Labeled]) -> list[Labeled]:
    """The labels with a decimal comma, if all labels are such numbers or whole numbers."""
    found = [example for example in examples if is_comma_number(example.label)]
    others = len(examples) - len(found)
    whole = sum(kind_of(example.label) == "whole number" for example in examples)
    return found if others == whole else []


def stray_diagnostic(example: Labeled, column: str) -> Diagnostic:
    """The diagnostic for a text among numbers."""
    expected = "a number, as in the other rows"
    hint = (
        'correct or remove the row, set data.on_bad_row to skip, or set model.task to "classification" to train on '
        "every label as a class"
    )
    row, label = example.row, example.label
    hint = f"write {label.replace(',', '.')}, with a point" if is_comma_number(label) else hint
    return Diagnostic(row.source_label, row.line, None, column, shown(label), expected, hint)


def comma_diagnostic(example: Labeled, column: str) -> Diagnostic:
    """The diagnostic for a number with a decimal comma."""
    row = example.row
    assert isinstance(example.label, str)
    point, bars = example.label.replace(",", "."), example.label.replace(",", "|")
    hint = (
        f'write {point} for a number, {bars} with model.task "multi_label" for two classes, or set model.task to '
        '"classification" to use it as a class name'
    )
    return Diagnostic(
        row.source_label, row.line, None, column, f"{shown(example.label)}, with a comma", "a class or a number", hint
    )


__all__ = ["LabelSpace", "infer_task"]
_PLURALS: dict[Kind, str] = {"whole number": "whole numbers", "text": "text", "true or false": "true or false"}


def infer_task(
    examples: Sequence[Labeled],
    task: Task | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    *,
    column: str = "label",
    on_bad_row: Literal["error", "skip"] = "error",
) -> LabelSpace:
    """Infer the task and the classes from the labels, or check the labels against the config.

    Args:
        examples: all with a label.
        task: from the config; None infers it.
        num_classes: from the config; 1 means regression.
        class_names: names in the order of the classes (`model.labels`): the labels themselves, or names for 0 to n - 1.
        column: the label's column, for diagnostics.
        on_bad_row: "skip" ignores a few labels without a class or number; the space does not encode them.
    Raises:
        DataError: labels of several kinds, labels that contradict the config, or a single class.
    """
    if not examples:
        raise DataError(
            [Diagnostic("data", None, None, column, "no labeled row", "at least two rows with different labels")]
        )
    source = examples[0].row.source
    if class_names is not None and num_classes not in (None, len(class_names)):
        actual = f"{num_classes} and {len(class_names)} names"
        raise DataError(
            [Diagnostic(source, None, None, "model.num_classes", actual, "as many classes as model.labels names")]
        )
    skips = on_bad_row == "skip"
    if task is None:
        task, examples = _task_of(examples, num_classes, class_names, column, skips=skips)
    if task == "regression":
        return _regression(examples, num_classes, class_names, column, skips=skips)
    if skips and not _all_text(examples):
        examples = _without(examples, labels_of_other_kinds(examples, is_class=task == "classification"))
    members = _members(examples, task, column)
    kind = _member_kind(examples, members, task, column)
    counts = Counter(
        key for listed in members for key in (key_of(member, kind) for member in listed) if key is not None
    )
    keys, names = _classes(counts, kind, num_classes, class_names, source)
    space = LabelSpace(task, names, keys, kind, len(keys), "")
    _encode_all(space, examples, column, skips=skips)
    counts = Counter({key: count for key, count in counts.items() if key in keys})
    summary = _summary(task, kind, keys, names, counts, examples, column)
    space = LabelSpace(task, names, keys, kind, len(keys), summary)
    if len(counts) < (2 if task == "classification" else 1):
        actual = f"every row labeled {next(iter(counts))}" if counts else "no row with a class"
        hint = "nothing can be learned from a single class; is the right column the label (data.columns.label)?"
        raise DataError([Diagnostic(source, None, None, column, actual, "rows of at least 2 classes", hint)])
    return space


def _task_of(
    examples: Sequence[Labeled],
    num_classes: int | None,
    class_names: Sequence[str] | None,
    column: str,
    *,
    skips: bool,
) -> tuple[Task, Sequence[Labeled]]:
    """The task that the labels imply, and the examples it is based on."""
    strays = texts_among_numbers(examples, num_classes, class_names)
    if skips:
        strays = strays or ([] if _all_text(examples) else labels_of_other_kinds(examples, is_class=False))
        examples = _without(examples, strays)
    elif strays and _all_text(examples):
        _raise([stray_diagnostic(example, column) for example in strays])
    if _all_text(examples):
        _raise([comma_diagnostic(example, column) for example in commas(examples)])
    kinds = _first_of_each_kind(examples, column)
    if set(kinds) <= _NUMBERS:
        return "regression" if "number" in kinds or num_classes == 1 else "classification", examples
    if set(kinds) == {"list"}:
        return "multi_label", examples
    if len(kinds) == 1 or _all_text(examples):
        return "classification", examples
    raise _mixed(kinds, column)


def _all_text(examples: Sequence[Labeled]) -> bool:
    """Whether every label is text, as in CSV."""
    return all(isinstance(example.label, str) for example in examples)


def _without(examples: Sequence[Labeled], strays: Sequence[Labeled]) -> list[Labeled]:
    left_out = {id(example) for example in strays}
    return [example for example in examples if id(example) not in left_out]


def _first_of_each_kind(examples: Sequence[Labeled], column: str) -> dict[Kind, Labeled]:
    kinds: dict[Kind, Labeled] = {}
    for example in examples:
        kind = kind_of(example.label)
        if kind is None:
            raise label_error(example.row, column, example.label, "a class, a number or a list of classes")
        kinds.setdefault(kind, example)
    return kinds


def _mixed(kinds: dict[Kind, Labeled], column: str) -> DataError:
    expected = "labels of one kind in all rows"
    hint = "write all labels in one form, or set data.on_bad_row to skip to drop the few of another kind"
    diagnostics = []
    for kind, example in kinds.items():
        actual = f"{shown(example.label)} (the first {kind})"
        diagnostics.append(Diagnostic(example.row.source_label, example.row.line, None, column, actual, expected, hint))
    return DataError(diagnostics)


def _regression(
    examples: Sequence[Labeled],
    num_classes: int | None,
    class_names: Sequence[str] | None,
    column: str,
    *,
    skips: bool,
) -> LabelSpace:
    if num_classes not in (None, 1) or class_names is not None:
        numbered = [example for example in examples if kind_of(example.label) == "number"]
        first = (numbered or list(examples))[0]
        field = "model.num_classes" if class_names is None else "model.labels"
        hint = f"leave {field} out for regression, or correct the label"
        raise label_error(first.row, column, first.label, f"a class, because {field} is set", hint)
    space = LabelSpace("regression", (), (), "number", 1, "")
    values = [value for value in _encode_all(space, examples, column, skips=skips) if isinstance(value, float)]
    if min(values) == max(values):
        actual = f"the value {values[0]:g} in every row"
        raise DataError([Diagnostic(examples[0].row.source, None, None, column, actual, "values that differ")])
    summary = f"task: regression, {len(values)} values from {min(values):g} to {max(values):g}"
    return LabelSpace("regression", (), (), "number", 1, summary)


def _members(examples: Sequence[Labeled], task: Task, column: str) -> list[list[object]]:
    """The classes of each row; one for classification."""
    if task == "classification":
        return [[sole(example.label)] for example in examples]
    listed = [members_of(example.label) for example in examples]
    diagnostics = [
        Diagnostic(example.row.source_label, example.row.line, None, column, shown(example.label),
              "a list of classes, or a|b in CSV (task: multi_label)")
        for example, members in zip(examples, listed, strict=True)
        if members is None
    ]  # fmt: skip
    _raise(diagnostics)
    return [members for members in listed if members is not None]


def _member_kind(examples: Sequence[Labeled], members: Sequence[Sequence[object]], task: Task, column: str) -> Kind:
    """The kind of all classes; numbers among text count as text if all are strings."""
    kinds: dict[Kind, Labeled] = {}
    only_strings = True
    for example, listed in zip(examples, members, strict=True):
        for member in listed:
            kind = kind_of(member)
            if kind is None or kind == "list":
                hint = 'with several classes per row, model.task is "multi_label"' if kind == "list" else ""
                raise label_error(example.row, column, example.label, f"one class (task: {task})", hint)
            only_strings = only_strings and isinstance(member, str)
            kinds.setdefault(kind, example)
    if not kinds:
        return "text"
    if only_strings and set(kinds) != {"whole number"}:
        return "text"
    if "number" in kinds:
        example = kinds["number"]
        hint = "set model.task to regression to learn the value itself"
        raise label_error(example.row, column, example.label, f"a class (task: {task}), not a fraction", hint)
    if len(kinds) > 1:
        raise _mixed(kinds, column)
    return next(iter(kinds))


def _classes(
    counts: Counter[str], kind: Kind, num_classes: int | None, class_names: Sequence[str] | None, source: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys and names of the classes, in order."""
    actual = tuple(class_names) if class_names is not None else None
    if kind == "whole number":
        numbers = sorted(int(key) for key in counts)
        if actual is not None and set(counts) <= set(actual):
            return actual, actual
        size = num_classes if actual is None else len(actual)
        if size is None and numbers == list(range(len(numbers))):
            size = len(numbers)
        keys = tuple(map(str, range(size))) if size is not None else tuple(map(str, numbers))
        return keys, actual or keys
    keys = ("false", "true") if kind == "true or false" else tuple(sorted(counts))
    if actual is not None:
        is_renamed = kind == "true or false" and len(actual) == 2 and set(actual) != set(keys)
        return (keys, actual) if is_renamed else (actual, actual)
    if num_classes is not None and num_classes != len(keys):
        listed = ", ".join(f"{shown(key)}: {count}" for key, count in sorted(counts.items(), key=_by_count)[:20])
        found = f"{len(keys)} different labels ({listed}{', ...' if len(counts) > 20 else ''})"
        hint = f"set model.num_classes to {len(keys)}, list every class in model.labels, or correct the rare labels"
        raise DataError([Diagnostic(source, None, None, "model.num_classes", found, f"{num_classes} classes", hint)])
    return keys, keys


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _encode_all(
    space: LabelSpace, examples: Sequence[Labeled], column: str, *, skips: bool
) -> list[int | float | list[int]]:
    """Encode the labels; with `skips`, drop those that are not in the space, unless none is left."""
    encoded, diagnostics = [], list[Diagnostic]()
    for example in examples:
        try:
            encoded.append(space.encode(example.label, example.row, column))
        except DataError as error:
            diagnostics.extend(error.diagnostics)
    if not skips or not encoded:
        _raise(diagnostics)
    return encoded


def _raise(diagnostics: Sequence[Diagnostic]) -> None:
    if diagnostics:
        advice = (
            "correct the labels, or model.task, model.num_classes and model.labels; or set data.on_bad_row to skip to "
            "leave these rows out"
        )
        raise BadRows(diagnostics[:MAXIMUM_DIAGNOSTICS], len(diagnostics), advice)


def _summary(
    task: Task,
    kind: Kind,
    keys: Sequence[str],
    names: Sequence[str],
    counts: Counter[str],
    examples: Sequence[Labeled],
    column: str,
) -> str:
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    summary = f"task: {task}, {len(keys)} classes ({listed}), from labels that are {_PLURALS[kind]}"
    unseen = [name for key, name in zip(keys, names, strict=True) if key not in counts]
    if unseen:
        summary += f"; no row is labeled {', '.join(unseen[:12])}{', ...' if len(unseen) > 12 else ''}"
    if len(keys) > max(20, len(examples) // 2):
        summary += f"; {len(keys)} classes for {len(examples)} rows: is {shown(column)} the right column?"
    if task == "multi_label" and all(isinstance(each.label, list) and len(each.label) == 1 for each in examples):
        summary += '; every list holds one label: for one class per row set model.task to "classification"'
    return summary
