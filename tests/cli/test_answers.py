"""Tables line up, numbers read well, and JSON is JSON."""

from __future__ import annotations

import json

import pytest

from loopos.cli.answers import confusion_table, say_json, shown, table
from loopos.config.figures import as_bytes, as_time


def test_numbers_are_right_aligned_and_text_left_aligned() -> None:
    assert table([("mae", 0.25), ("accuracy", 12)], head=("metric", "value"), indent="") == (
        "metric    value\nmae        0.25\naccuracy     12"
    )


def test_a_table_without_rows_is_empty() -> None:
    assert table([], head=("a", "b")) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (True, "yes"), (1234567, "1,234,567"), (0.123456, "0.1235"), (1e6, "1,000,000"), ("x", "x")],
)
def test_a_cell(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_confusion_names_rows_and_numbers_columns() -> None:
    text = confusion_table(["no", "yes"], [[10, 0], [3, 7]])
    assert text.splitlines() == [
        "  true class      0  1",
        "  no          0  10  ·",
        "  yes         1   3  7",
    ]


@pytest.mark.parametrize(
    ("count", "expected"), [(12, "12 B"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (1_610_000_000, "1.61 GB")]
)
def test_bytes(count: int, expected: str) -> None:
    assert as_bytes(count) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(299, "299 s"), (600, "10 min"), (7200, "2.0 h")])
def test_time(seconds: float, expected: str) -> None:
    assert as_time(seconds) == expected


def test_json_has_null_where_it_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "é")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [1, "é"]}
