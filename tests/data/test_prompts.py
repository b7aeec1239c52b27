"""Rows to prompts: strings, messages and preference rows; each prompt once, and every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.preference_formats import detect
from loopos.data.prompts import Prompt, PromptContent, read_prompts, shared_text
from loopos.data.rows import read

Shown = str | list[tuple[str, str]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts_of(
    tmp_path: Path, *rows: dict[str, Any], columns: dict[str, str] | None = None, as_text: bool = False
) -> list[Prompt]:
    return read_prompts(read(write(tmp_path / "rows.jsonl", list(rows))), columns or {}, as_text=as_text)[0]


def shown(words: PromptContent) -> Shown:
    return words if isinstance(words, str) else [(message.role, message.content) for message in words]


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant, one after the other."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


ASKED: Shown = [("user", "a")]


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"prompt": "a"}, "prompts", ASKED),
        ({"problem": "a", "answer": "4"}, "prompts", ASKED),
        ({"question": "a", "id": 3}, "prompts", ASKED),
        ({"instruction": "a", "input": "x", "output": "b"}, "prompts", [("user", "a\nx")]),
        ({"instruction": "a", "input": "", "system": "s"}, "prompts", [("system", "s"), ("user", "a")]),
        ({"prompt": turns("a")}, "prompts", ASKED),
        ({"messages": turns("a", "b")}, "prompts", ASKED),
        ({"messages": turns("a", "b", "c")}, "prompts", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "prompts", ASKED),
        ({"messages": [*turns("a", "b"), {"role": "assistant", "content": "c"}]}, "prompts", ASKED),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", ASKED),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs", ASKED),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "groups", ASKED),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c")}, "implicit pairs", ASKED),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "implicit pairs",
            "\n\nHuman: a\n\nAssistant:",
        ),
    ],
)
def test_prompts_of_many_kinds_of_rows(tmp_path: Path, row: dict[str, Any], kind: str, expected: Shown) -> None:
    (prompt,) = prompts_of(tmp_path, row)
    assert shown(prompt.prompt) == expected
    assert prompt.row.line == 1
    assert detect(list(row), {}, prompts=True).kind == kind


def test_raw_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "2+2= "}, {"prompt": turns("a")}])
    found, report = read_prompts(read(path), {}, as_text=True)
    assert [shown(prompt.prompt) for prompt in found] == ["2+2= ", ASKED]
    assert report.notes[-1] == "text without a chat template: 1 of 2"
    assert shown(prompts_of(tmp_path, {"instruction": "a", "input": "x"}, as_text=True)[0].prompt) == "a\nx"


def test_the_column_can_be_chosen(tmp_path: Path) -> None:
    (prompt,) = prompts_of(tmp_path, {"title": "a", "prompt": "x"}, columns={"prompt": "title"})
    assert shown(prompt.prompt) == ASKED


def test_equal_prompts_come_once_and_are_counted(tmp_path: Path) -> None:
    call = {"role": "user", "content": "a", "name": "Ida", "rank": 1}
    turned = {"rank": 1, "name": "Ida", "content": "a", "role": "user"}
    rows: list[dict[str, Any]] = [
        {"prompt": "a"}, {"prompt": "b"}, {"prompt": turns("a")}, {"prompt": "a"}, {"prompt": "a "}, {"prompt": ""},
        {"prompt": [call]}, {"prompt": [turned]}, {"prompt": 3},
    ]  # fmt: skip
    found, report = read_prompts(read(write(tmp_path / "rows.jsonl", rows), on_bad_row="skip"), {})
    assert [prompt.row.line for prompt in found] == [1, 2, 5, 7]
    assert report.dropped == {"same prompt again": 3, "prompt is blank": 1, "prompt is not a string": 1}
    assert (report.read, report.used) == (9, 4)
    texts, counted = read_prompts(read(write(tmp_path / "texts.jsonl", rows[:4])), {}, as_text=True)
    assert [shown(prompt.prompt) for prompt in texts] == ["a", "b", ASKED]
    assert (counted.read, counted.used, counted.dropped) == (4, 3, {"same prompt again": 1})


def test_without_a_prompt_twice_nothing_is_dropped(tmp_path: Path) -> None:
    _, report = read_prompts(read(write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])), {})
    assert (report.read, report.used, report.dropped) == (2, 2, {})


@pytest.mark.parametrize(
    ("row", "field", "piece"),
    [
        ({"prompt": ""}, "prompt", "got ''"),
        ({"prompt": 3}, "prompt", "got 3 (a number)"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "only assistant messages"),
        ({"messages": [7]}, "messages[0]", "got 7 (a number)"),
        ({"chosen": turns("a", "b"), "rejected": turns("x", "b")}, "rejected", "no prompt column"),
        ({"chosen": "a b", "rejected": None}, "rejected", "got null"),
        ({"prompt": turns("a"), "input": "x"}, "input", "the whole prompt in the messages"),
    ],
)
def test_broken_rows_name_line_and_field(tmp_path: Path, row: dict[str, Any], field: str, piece: str) -> None:
    with pytest.raises(DataError) as caught:
        prompts_of(tmp_path, row)
    (diagnostic,) = caught.value.diagnostics
    assert str(diagnostic).startswith(f"{tmp_path}/rows.jsonl:1: {field}: got ")
    assert piece in str(diagnostic)


@pytest.mark.parametrize("columns", ["text", "chosen completion", "title body"])
def test_columns_that_hold_no_prompt(columns: str) -> None:
    with pytest.raises(DataError, match=r'data.columns: \{"prompt": "COLUMN"\}'):
        detect(columns.split(), {}, prompts=True)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("a Assistant: b Assistant: c", "a Assistant: b Assistant: d", "a Assistant: b Assistant:"),
        ("a Assistant: b Assistant: c", "a Assistant: x Assistant: c", "a Assistant:"),
        ("how is heat", "how is heavy", "how is"),
        ("how is  heat", "how is  heavy", "how is"),
        ("how\n\nfine", "how\n\ngood", "how"),
        ("heat", "heavy", ""),
        ("a b", "c d", ""),
        (" a", " b", ""),
        ("a b", "a b c", "a"),
    ],
)
def test_where_two_texts_part(one: str, other: str, shared: str) -> None:
    assert shared_text(one, other) == shared_text(other, one) == shared
