"""Labels to tasks and classes, and each label there and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.formats import Labeled
from loopos.data.label_space import LabelSpace, Task, key_of, kind_of, label_space_of, members_of
from loopos.data.labels import infer_task
from loopos.data.rows import Row

ROW = Row({}, "rows.jsonl", 9, 7)


def examples(labels: Sequence[object]) -> list[Labeled]:
    return [
        Labeled(f"text {index}", None, label, Row({}, "rows.jsonl", index + 1, index))
        for index, label in enumerate(labels)
    ]


def infer(labels: Sequence[object], task: Task | None = None, num_classes: int | None = None,
          class_names: Sequence[str] | None = None) -> LabelSpace:  # fmt: skip
    return infer_task(examples(labels), task, num_classes, class_names)


@pytest.mark.parametrize(
    ("labels", "class_names", "encoded", "decoded"),
    [
        ([1, 0, 2, 1], ("0", "1", "2"), [1, 0, 2, 1], [1, 0, 2, 1]),
        (["1", "0"], ("0", "1"), [1, 0], [1, 0]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1], [1, 0, 1]),
        (["2.0", "1"], ("1", "2"), [1, 0], [2, 1]),
        ([1, -1, 1], ("-1", "1"), [1, 0, 1], [1, -1, 1]),
        ([10, 2, 5], ("2", "5", "10"), [2, 0, 1], [10, 2, 5]),
        (["neg", "pos", "mid"], ("mid", "neg", "pos"), [1, 2, 0], ["neg", "pos", "mid"]),
        (["007", "1"], ("007", "1"), [0, 1], ["007", "1"]),
        (["1", "2.5", "x"], ("1", "2.5", "x"), [0, 1, 2], ["1", "2.5", "x"]),
        ([True, False], ("false", "true"), [1, 0], [True, False]),
        (["true", "false"], ("false", "true"), [1, 0], ["true", "false"]),
        ([2**60, 2**60 + 1], (str(2**60), str(2**60 + 1)), [0, 1], [2**60, 2**60 + 1]),
    ],
)
def test_classification_is_read_off_the_labels(
    labels: list[object], class_names: tuple[str, ...], encoded: list[int], decoded: list[object]
) -> None:
    space = infer(labels)
    assert (space.task, space.class_names, space.num_outputs) == ("classification", class_names, len(class_names))
    assert [space.encode(label, ROW) for label in labels] == encoded
    back = [space.decode(number) for number in encoded]
    assert back == decoded
    assert [type(label) for label in back] == [type(label) for label in decoded]


@pytest.mark.parametrize(
    ("labels", "encoded"),
    [
        ([1.5, 2, -3], [1.5, 2.0, -3.0]),
        (["1.5", "2", "-3e-1"], [1.5, 2.0, -0.3]),
        ([0.25, "4"], [0.25, 4.0]),
    ],
)
def test_a_fraction_means_regression(labels: list[object], encoded: list[float]) -> None:
    space = infer(labels)
    assert (space.task, space.class_names, space.num_outputs) == ("regression", (), 1)
    assert [space.encode(label, ROW) for label in labels] == encoded
    assert space.decode(encoded[0]) == encoded[0]
    assert space.summary == f"task: regression, {len(labels)} values from {min(encoded):g} to {max(encoded):g}"


def test_lists_mean_multi_label() -> None:
    space = infer([["b", "a"], [], ["c"]])
    assert (space.task, space.class_names) == ("multi_label", ("a", "b", "c"))
    assert [space.encode(label, ROW) for label in (["b", "a"], [], ["c"])] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert space.decode([0, 1, 1]) == ["b", "c"]
    numbers = infer([[0, 2], [1]])
    assert (numbers.encode([2, 0], ROW), numbers.decode([1, 0, 1])) == ([1, 0, 1], [0, 2])
    wide = infer([[0, 2], [1]], num_classes=5)
    assert wide.encode([4], ROW) == [0, 0, 0, 0, 1]


def test_bars_are_read_where_the_task_is_multi_label() -> None:
    space = infer(["a|b", "b", " c | a "], task="multi_label")
    assert (space.class_names, space.encode("c|b", ROW)) == (("a", "b", "c"), [0, 1, 1])
    assert infer(["3|1", "0", "2"], task="multi_label").encode("1|3", ROW) == [0, 1, 0, 1]
    assert infer(["a|b", "b"]).class_names == ("a|b", "b")


def test_an_explicit_task_wins() -> None:
    assert infer([1, 2, 5], task="regression").encode(5, ROW) == 5.0
    assert infer([1, 2, 5], num_classes=1).task == "regression"
    assert infer(["1.5", "2.0"], task="classification").class_names == ("1.5", "2.0")


def test_more_num_classes_than_labels_is_reported() -> None:
    space = infer([0, 3, 3], num_classes=5)
    assert space.class_names == ("0", "1", "2", "3", "4")
    assert space.summary == (
        "task: classification, 5 classes (0, 1, 2, 3, 4), from labels that are whole numbers; no row is labeled 1, 2, 4"
    )


@pytest.mark.parametrize(
    ("labels", "names", "encoded", "decoded"),
    [
        (["neg", "pos"], ("pos", "neg", "mixed"), [1, 0], ["neg", "pos"]),
        ([1, 0], ("no", "yes"), [1, 0], ["yes", "no"]),
        (["2", "1"], ("1", "2"), [1, 0], [2, 1]),
        ([True, False], ("no", "yes"), [1, 0], ["yes", "no"]),
        ([-1, 1], ("1", "-1"), [1, 0], [-1, 1]),
    ],
)
def test_class_names_order_or_name_the_classes(
    labels: list[object], names: tuple[str, ...], encoded: list[int], decoded: list[object]
) -> None:
    space = infer(labels, class_names=names)
    assert space.class_names == names
    assert [space.encode(label, ROW) for label in labels] == encoded
    assert [space.decode(number) for number in encoded] == decoded


def test_a_space_survives_plain_fields() -> None:
    space = infer(["b", "a"])
    kept = json.loads(json.dumps(asdict(space)))
    again = label_space_of(kept)
    assert again == space
    # Models of version 0.1 name the summary "said".
    kept["said"] = kept.pop("summary")
    assert label_space_of(kept) == space
    assert again.encode("b", ROW) == 1


@pytest.mark.parametrize(
    ("label", "piece"),
    [
        ("refnd", "did you mean 'refund'?"),
        ("x", "one of the 2 classes order, refund"),
        (3, "got 3"),
        (None, "got None"),
    ],
)
def test_an_unknown_label_later_names_its_row(label: object, piece: str) -> None:
    with pytest.raises(DataError) as caught:
        infer(["refund", "order"]).encode(label, ROW, "intent")
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.source, diagnostic.line, diagnostic.field) == ("rows.jsonl", 9, "intent")
    assert piece in str(diagnostic)


def test_no_examples_is_a_diagnostic() -> None:
    with pytest.raises(DataError, match="no labeled row"):
        infer([])


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (True, "true or false"), (3, "whole number"), (3.0, "whole number"), (3.5, "number"), ("-3", "whole number"),
        ("3.0", "whole number"), ("1e-3", "number"), (".5", "number"), ("03", "text"), ("1_0", "text"),
        ("nan", "text"), ("1e999", "text"), ("\u0663", "text"), ("", "text"), ([], "list"), (None, None), ({}, None),
        (float("nan"), None),
    ],
)  # fmt: skip
def test_kinds(label: object, kind: str | None) -> None:
    assert kind_of(label) == kind


def test_keys_and_members() -> None:
    assert [key_of(label, "whole number") for label in (1, 1.0, "1", "1.0", "+1", 1.5, True)] == ["1"] * 5 + [None] * 2
    assert [key_of(label, "text") for label in ("1", " 1.0 ", 1)] == ["1", "1.0", None]
    assert members_of("a| b||") == ["a", "b"]
    assert members_of([" a", 2]) == ["a", 2]
    assert members_of(3) is None
