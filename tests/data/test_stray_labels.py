"""Labels that do not belong to the others: named with the remedy, or left out where bad rows are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError
from loopos.config.sections import DataSection, ModelSection
from loopos.data.labeled import LabeledData, load_labeled


def load(folder: Path, labels: list[Any], /, *, skip: bool = True, suffix: str = ".csv", **model: Any) -> LabeledData:
    file = folder / f"rows{suffix}"
    if suffix == ".csv":
        file.write_text("text,rating\n" + "".join(f"film {i},{_cell(label)}\n" for i, label in enumerate(labels)))
    else:
        rows = [{"text": f"film {i}", "rating": label} for i, label in enumerate(labels)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(
        pretrained_weights="new",
        training_data=str(file),
        output_dir=str(folder / "run"),
        validation_share=0,
        on_bad_row="skip" if skip else "error",
    )
    return load_labeled(data, ModelSection(**model), seed=0)


def _cell(label: Any) -> str:
    return f'"{label}"' if "," in str(label) else str(label)


RATINGS = [str(1.5 + i % 9 / 2) for i in range(24)]
CLASSES = ["pos", "neg"] * 12


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("labels", "model", "task", "dropped"),
    [
        ([*CLASSES, "???"], {"labels": ["neg", "pos"]}, "classification", "label is not a known class"),
        ([*RATINGS, "N/A"], {"task": "regression"}, "regression", "label is not a number"),
        ([*RATINGS, "N/A"], {}, "regression", "label is not a number"),
        ([*([0, 1] * 12), 9], {"num_classes": 2}, "classification", "label is not a known class"),
        ([*([0, 1] * 12), 9], {"labels": ["neg", "pos"]}, "classification", "label is not a known class"),
        ([*([0, 1] * 12), "N/A"], {}, "classification", "label is not a known class"),
        ([*([0, 1] * 12), "maybe"], {"labels": ["neg", "pos"]}, "classification", "label is not a known class"),
    ],
)
def test_rows_of_no_class_are_skipped(
    tmp_path: Path, labels: list[Any], model: dict[str, Any], task: str, dropped: str, suffix: str
) -> None:
    data = load(tmp_path, labels, suffix=suffix, **model)
    assert data.space.task == task
    assert data.reports[0].summary() == f"25 rows read, 24 used, 1 dropped ({dropped})"
    assert [example.row.index for example in data.train] == list(range(24))
    assert data.space.num_outputs == (1 if task == "regression" else 2)
    assert [diagnostic.field for diagnostic in data.reports[0].diagnostics] == ["rating"]


@pytest.mark.parametrize(
    ("labels", "line", "field"),
    [
        ([*map(str, range(3000)), "N/A"], 3002, "rating"),
        ([*map(str, range(3000)), "nan"], 3002, "rating"),
        (["inf", *map(str, range(3000))], 2, "rating"),
        ([*RATINGS, "N/A"], 26, "rating"),
        ([*RATINGS, "good"], 26, "rating"),
        ([*(["1", "2", "3"] * 8), "n/a"], 26, "rating"),
        (["3,5", "4,25", "2"], 2, "rating"),
        ([*RATINGS, "2,5"], 26, "rating"),
    ],
)
def test_a_text_among_numbers_names_row_and_remedy(tmp_path: Path, labels: list[str], line: int, field: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, labels, skip=False)
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.source, diagnostic.line, diagnostic.field) == (str(tmp_path / "rows.csv"), line, field)
    remedies = {"3,5": "write 3.5 for a number", "2,5": "write 2.5, with a point"}
    value = diagnostic.actual.split("'")[1]
    assert remedies.get(value, 'model.task to "classification"') in diagnostic.hint


@pytest.mark.parametrize(
    ("labels", "num_classes"),
    [
        ([*(["1", "2", "3"] * 8), "other"], 4),
        (["1.0", "2.5", "beta", "beta"], 3),
        (["a", "b", "1"] * 3, 3),
        (["3,5", "x"], 2),
    ],
)
def test_names_among_numbers_are_classes(tmp_path: Path, labels: list[str], num_classes: int) -> None:
    assert load(tmp_path, labels, skip=False).space.num_outputs == num_classes


def test_a_name_in_the_config_is_a_class(tmp_path: Path) -> None:
    labels = [*(["1", "2"] * 8), "n/a"]
    assert load(tmp_path, labels, skip=False, labels=["1", "2", "n/a"]).space.class_names == ("1", "2", "n/a")


@pytest.mark.parametrize("labels", [[*RATINGS, "N/A"], ["3,5", "4,25"]])
def test_explicit_classes_are_used_in_their_order(tmp_path: Path, labels: list[str]) -> None:
    assert load(tmp_path, labels, skip=False, task="classification").space.num_outputs == len(set(labels))


def test_a_decimal_comma_where_values_are_learned(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, ["3,5", "4", "2"], skip=False, task="regression")
    assert caught.value.diagnostics[0].hint == "write 3.5, with a point"


def test_nothing_left_to_learn_is_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a number"):
        load(tmp_path, ["a", "b"], task="regression")


def test_lists_of_one_label(tmp_path: Path) -> None:
    labels = [["pos"], ["neg"], ["pos"]]
    data = load(tmp_path, labels, skip=False, suffix=".jsonl")
    assert data.space.task == "multi_label"
    assert any(
        'every list holds one label: for one class per row set model.task to "classification"' in summary
        for summary in data.summary
    )
    data = load(tmp_path, labels, skip=False, suffix=".jsonl", task="classification")
    assert (data.space.class_names, data.train_targets) == (("neg", "pos"), [1, 0, 1])
    with pytest.raises(DataError, match=r'model\.task is "multi_label"') as caught:
        load(tmp_path, [*labels, ["pos", "neg"]], skip=False, suffix=".jsonl", task="classification")
    assert caught.value.diagnostics[0].line == 4
    data = load(tmp_path, [*labels * 2, ["pos", "neg"]], suffix=".jsonl", task="classification")
    assert data.reports[0].summary() == "7 rows read, 6 used, 1 dropped (label is not a known class)"


PRODIGY = [
    {"text": "a", "label": "x", "answer": "accept"},
    {"text": "b", "label": "y", "answer": "reject"},
    {"text": "c", "label": "y", "answer": "accept"},
    {"text": "d", "label": "x", "answer": "ignore"},
]


def prodigy(folder: Path, rows: list[dict[str, str]]) -> LabeledData:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(pretrained_weights="new", training_data=str(file), output_dir="run", validation_share=0)
    return load_labeled(data, ModelSection(), seed=0)


def test_rows_that_an_annotator_rejected_are_not_learned(tmp_path: Path) -> None:
    data = prodigy(tmp_path, PRODIGY)
    assert [example.text for example in data.train] == ["a", "c"]
    assert data.reports[0].summary() == (
        '4 rows read, 2 used, 1 dropped ("answer" is ignore), 1 dropped ("answer" is reject)'
    )


def test_an_answer_of_another_kind_is_a_column_that_is_not_read(tmp_path: Path) -> None:
    data = prodigy(tmp_path, [*PRODIGY, {"text": "e", "label": "x", "answer": "42"}])
    assert data.reports[0].summary() == "5 rows read, 5 used; not read: answer"


def test_only_rejected_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row whose 'answer' is accept"):
        prodigy(tmp_path, PRODIGY[1:2])
