"""What annotation tools export: two responses with a preferred side, and Label Studio's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.formats import read_labeled
from loopos.data.preferences import Pair, read_comparisons
from loopos.data.prompts import read_prompts
from loopos.data.rows import read

FIRST, SECOND, TIE = Pair(0, 1), Pair(1, 0), Pair(0, 1, 0.5)


def pairs_of(folder: Path, *rows: dict[str, Any]) -> list[Any]:
    file = folder / "rows.json"
    file.write_text(json.dumps(list(rows)), encoding="utf-8")
    return read_comparisons(read(str(file)), {})[0]


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        (1, FIRST), (2, SECOND), (2.0, SECOND), ("1", FIRST), ("response1", FIRST), ("response-2", SECOND), ("A", FIRST),
        ("b", SECOND), ("model_b", SECOND), ("left", FIRST), ("Right", SECOND), ("tie", TIE), ("both", TIE),
        ([1, 1, 2, 1], Pair(0, 1, 0.75)), ([1, 2], TIE), ([2, "tie"], Pair(1, 0, 0.75)), ("[1, 1]", FIRST),
        ([{"user_id": "u", "value": "response2", "status": "submitted"}], SECOND),
    ],
)  # fmt: skip
def test_a_preferred_side(tmp_path: Path, preference: object, expected: Pair) -> None:
    row = {"instruction": "Where?", "response1": "In Ulm.", "response2": "In Bonn.", "preference": preference}
    (found,) = pairs_of(tmp_path, row)
    assert found.pairs == (expected,)
    assert [response[0].content for response in found.responses] == ["In Ulm.", "In Bonn."]
    assert found.prompt[0].content == "Where?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Where?", "response_a": "In Ulm.", "response_b": "In Bonn.", "winner": "model_a"},
        {"prompt": "Where?", "answer1": "In Ulm.", "answer2": "In Bonn.", "comparison": "left", "annotator": 3},
        {"prompt": "Where?", "response-1": "In Ulm.", "response-2": "In Bonn.", "preference.responses": ["response-1"]},
    ],
)
def test_names_of_the_columns(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = pairs_of(tmp_path, row)
    assert found.pairs == (FIRST,)


@pytest.mark.parametrize(
    ("preference", "piece"),
    [(0, "0 could mean the first response or a tie"), (3, "1 or 2"), (None, "null"), ([], "an empty list"), (True, "1 or 2"),
     ("good", "'good'"), (-1, "1 or 2"), ([1, "x"], "'x'")],
)  # fmt: skip
def test_preferences_that_carry_no_information(tmp_path: Path, preference: object, piece: str) -> None:
    row = {"prompt": "Where?", "response1": "In Ulm.", "response2": "In Bonn.", "preference": 1}
    with pytest.raises(DataError) as caught:
        pairs_of(tmp_path, row, {**row, "preference": preference})
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.field) == (1, "preference")
    assert piece in str(diagnostic)


def task(data: dict[str, Any], *answers: Any, kind: str = "pairwise", name: str = "pw", cancelled: int = 0) -> Any:
    """A task of Label Studio's JSON export with an annotation for each answer."""
    annotations = [
        {"id": n, "was_cancelled": n <= cancelled,
         "result": [{"from_name": name, "to_name": "t", "type": kind, "value": answer}]}
        for n, answer in enumerate(answers, start=1)
    ]  # fmt: skip
    return {"id": 7, "data": data, "annotations": annotations, "meta": {}, "created_at": "2026-01-01T00:00:00Z"}


TEXTS = {"prompt": "Where?", "answer1": "In Ulm.", "answer2": "In Bonn."}


def test_label_studio_s_comparisons(tmp_path: Path) -> None:
    left, right = {"selected": "left"}, {"selected": "right"}
    found = pairs_of(
        tmp_path,
        task(TEXTS, left),
        task(TEXTS, right),
        task(TEXTS, left, left, right),
        task(TEXTS, left, right, cancelled=1),
    )
    assert [each.pairs[0] for each in found] == [FIRST, SECOND, Pair(0, 1, 2 / 3), SECOND]
    prompts, _ = read_prompts(read(str(tmp_path / "rows.json")), {})
    assert [prompt.prompt[0].content for prompt in prompts] == ["Where?"]  # type: ignore[union-attr]


def test_a_task_without_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preference"):
        pairs_of(tmp_path, task(TEXTS, {"selected": "left"}), task(TEXTS))


def test_label_studio_s_classes_and_ratings(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    good = task({"text": "a", "source": "x"}, {"choices": ["good"]}, kind="choices", name="sentiment")
    bad = task({"text": "b", "source": "x"}, {"choices": ["bad"]}, kind="choices", name="sentiment")
    file.write_text(json.dumps([good, bad]))
    examples, report = read_labeled(read(str(file)), {})
    assert [(each.text, each.label) for each in examples] == [("a", "good"), ("b", "bad")]
    assert report.summary() == "2 rows read, 2 used; not read: source"
    file.write_text(json.dumps([task({"text": "a"}, {"rating": 4}, kind="rating", name="stars")]))
    examples, _ = read_labeled(read(str(file)), {})
    assert [each.label for each in examples] == [4]
