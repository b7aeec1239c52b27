"""Columns to roles, rows to examples, and the account of what was dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import DataError
from loopos.data.formats import LabeledFormat, detect, read_labeled, to_labeled
from loopos.data.rows import Row, read


@pytest.mark.parametrize(
    ("columns", "text", "pair", "label"),
    [
        ("text label", "text", None, "label"),
        ("idx sentence label", "sentence", None, "label"),
        ("Review Sentiment", "Review", None, "Sentiment"),
        ("label title content", "content", None, "label"),
        ("text label label_text", "text", None, "label"),
        ("id text labels", "text", None, "labels"),
        ("utterance intent", "utterance", None, "intent"),
        ("Tweet Text Category", "Text", None, "Category"),
        ("premise hypothesis label", "premise", "hypothesis", "label"),
        ("sentence1 sentence2 idx label", "sentence1", "sentence2", "label"),
        ("question1 question2 is_duplicate", "question1", "question2", "is_duplicate"),
        ("question sentence label idx", "question", "sentence", "label"),
        ("question answer passage_id label", "question", "answer", "label"),
        ("text text_pair label", "text", "text_pair", "label"),
        ("title label", "title", None, "label"),
        ("answer text label", "text", None, "label"),
        ("user_id text y", "text", None, "y"),
        ("comment-text toxicity", "comment-text", None, "toxicity"),
    ],
)
def test_columns_of_common_data_sets(columns: str, text: str, pair: str | None, label: str) -> None:
    found = detect(columns.split(), {})
    assert (found.text, found.text_pair, found.label) == (text, pair, label)


def test_the_choice_is_reported() -> None:
    assert detect(["sentence", "intent"], {}).summary == 'format: labeled (text <- "sentence", label <- "intent")'
    pair = detect(["premise", "hypothesis", "label"], {}).summary
    assert pair == 'format: labeled (text <- "premise", text_pair <- "hypothesis", label <- "label")'


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"text": "b"}, ("b", None, "label")),
        ({"text": "premise"}, ("premise", None, "label")),
        ({"label": "b"}, ("premise", "hypothesis", "b")),
        ({"text": "label", "label": "b"}, ("label", None, "b")),
        ({"text": "b", "text_pair": "premise"}, ("b", "premise", "label")),
        ({"text_pair": "b"}, ("premise", "b", "label")),
    ],
)
def test_overrides(overrides: dict[str, str], expected: tuple[str, str | None, str]) -> None:
    found = detect(["premise", "hypothesis", "label", "b"], overrides)
    assert (found.text, found.text_pair, found.label) == expected


def test_a_label_may_be_absent_when_predicting() -> None:
    assert detect(["text"], {}, require_label=False).label is None
    assert detect(["text", "intent", "emotion"], {}, require_label=False).label is None
    assert detect(["text", "intent"], {}, require_label=False).label == "intent"
    with pytest.raises(DataError, match=r'data.columns: \{"label": "COLUMN"\}'):
        detect(["text"], {})


def test_labels_when_predicting(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": null}\n{"text": "b"}\n{"text": "c", "label": " x "}\n')
    examples, report = read_labeled(read(str(path)), {}, require_label=False)
    assert [(example.text, example.label) for example in examples] == [("a", None), ("b", None), ("c", "x")]
    assert (report.read, report.used, report.dropped) == (3, 3, {})


def test_a_row_becomes_an_example() -> None:
    form = LabeledFormat("premise", "hypothesis", "label", "")
    row = Row({"premise": " a ", "hypothesis": "12", "label": "  yes "}, "rows.csv", 7, 5)
    example = to_labeled(row, form)
    assert (example.text, example.text_pair, example.label, example.row.line) == (" a ", "12", "yes", 7)
    with pytest.raises(DataError) as caught:
        to_labeled(Row({"premise": "", "hypothesis": None, "label": {}}, "rows.parquet", None, 5), form)
    assert [(diagnostic.source, diagnostic.line, diagnostic.field) for diagnostic in caught.value.diagnostics] == [
        ("rows.parquet (row 5)", None, "premise"),
        ("rows.parquet (row 5)", None, "hypothesis"),
        ("rows.parquet (row 5)", None, "label"),
    ]


def test_dropped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, object]] = [
        {"text": "a", "label": 1}, {"text": " ", "label": 1}, {"text": "", "label": None}, {"text": "b", "label": None},
        {"text": 3, "label": 1}, {"text": "c", "label": [[1]]}, {"text": "d", "label": 0},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n[1]\n")
    reader = read(str(path), on_bad_row="skip")
    examples, report = read_labeled(reader, {})
    assert [(example.text, example.row.line) for example in examples] == [("a", 1), ("d", 7)]
    assert report.dropped == {
        "unreadable row": 2, "text is blank": 2, "label is null": 1, "text is not a string": 1, "label is nested": 1,
    }  # fmt: skip
    assert (report.read, report.used) == (9, 2)
    assert len(report.diagnostics) == 8
    assert reader.report.bad_rows == 7


def test_no_row_left_is_a_diagnostic_under_skip_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n,1\n,0\n")
    with pytest.raises(DataError, match="2 rows, none of which can be used"):
        read_labeled(read(str(path), on_bad_row="skip"), {})


LINES = st.sampled_from(
    [
        '{"text": "a", "label": 1}', '{"text": "", "label": 1}', '{"text": "b"}', '{"label": 2}', "{", "[1]", "", "  ",
        '{"text": "c", "label": null}', '{"text": 7, "label": 1}', '{"text": "d", "label": {"x": 1}}', "null", '"x"',
        '{"text": "e", "label": NaN}', '{"text": "f", "text": "g", "label": 1}', '{"text": "h", "label": [1, 2]}',
    ]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(LINES, max_size=12))
def test_every_row_read_is_used_or_dropped_for_a_reason(
    lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "dropped.jsonl"
    path.write_text("\n".join([*lines, '{"text": "last", "label": 3}']))
    examples, report = read_labeled(read(str(path), on_bad_row="skip"), {})
    filled = [index for index, line in enumerate(lines, start=1) if line.strip()]
    assert report.read == len(filled) + 1 == report.used + sum(report.dropped.values())
    assert report.used == len(examples)
    kept = {example.row.line for example in examples}
    rejected = {diagnostic.line for diagnostic in report.diagnostics}
    assert kept | rejected == {*filled, len(lines) + 1}
    assert not kept & rejected
