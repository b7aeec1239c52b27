"""No column is lost: context follows the question, and a column that no role reads is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import DataError
from loopos.data.conversations import Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.formats import read_labeled
from loopos.data.preferences import read_comparisons
from loopos.data.prompts import PromptContent, read_prompts
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import Example, read_supervised

THINK = NAMED_FORMATS["think"]
ASKED, HELD, SAID = "When was the depot opened?", "The depot at Ulm was opened in 1900.", "In 1900."
BELOW = f"{ASKED}\n{HELD}"
CITIES = {"question": "Which city?", "answer": "B"}
LETTERED = "Which city?\nA. Ulm\nB. Bonn"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def supervised(folder: Path, row: dict[str, Any], columns: Any = None) -> tuple[Example, str]:
    """The example of a file of two such rows, and the account of the file."""
    examples, report = read_supervised(read(write(folder / "a.jsonl", row, row)), columns or {}, step_format=THINK)
    return examples[0], report.summary()


def asked(example: Example) -> str:
    """The content of the user's last message."""
    if isinstance(example, Demonstration):
        return example.problem
    assert isinstance(example, Conversation)
    return next(message.content for message in reversed(example.messages) if message.role == "user")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": ASKED, "context": HELD, "response": SAID}, BELOW),
        ({"instruction": ASKED, "input": "", "context": HELD, "output": SAID}, BELOW),
        ({"instruction": ASKED, "input": HELD, "context": "It is true.", "output": SAID}, f"{BELOW}\nIt is true."),
        ({"instruction": ASKED, "passage": HELD, "output": SAID}, BELOW),
        ({"instruction": ASKED, "context": None, "output": SAID}, ASKED),
        ({"question": ASKED, "context": HELD, "answer": SAID}, BELOW),
        ({"question": ASKED, "Document": HELD, "answer": SAID}, BELOW),
        ({"question": ASKED, "contexts": ["One.", "Two."], "answer": SAID}, f"{ASKED}\nOne.\nTwo."),
        ({"question": ASKED, "sql_context": "CREATE TABLE t (a INT)", "answer": SAID}, f"{ASKED}\nCREATE TABLE t (a INT)"),
        ({"problem": ASKED, "reasoning": ["so"], "answer": SAID, "input": HELD}, BELOW),
        (CITIES | {"choices": ["Ulm", "Bonn"]}, LETTERED),
        (CITIES | {"options": {"A": "Ulm", "B": "Bonn"}}, LETTERED),
        (CITIES | {"choices": {"text": ["Ulm", "Bonn"], "label": ["A", "B"]}}, LETTERED),
        (CITIES | {"choices": [{"label": "A", "text": "Ulm"}, {"label": "B", "text": "Bonn"}]}, LETTERED),
        (CITIES | {"choices": "['Ulm', 'Bonn']"}, LETTERED),
        (CITIES | {"options": "a ) Ulm , b ) Bonn"}, "Which city?\na ) Ulm , b ) Bonn"),
        ({"instruction": "Which city?", "context": HELD, "choices": [1, 2], "output": "A"},
         f"Which city?\n{HELD}\nA. 1\nB. 2"),
    ],
)  # fmt: skip
def test_context_follows_the_question(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    example, told = supervised(tmp_path, row)
    assert asked(example) == expected
    assert told == "2 rows read, 2 used"


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["Ulm", "Bonn"], 1, "B"),
        (["Ulm", "Bonn"], "0", "A"),
        (["10", "20"], 20, "20"),
        (["10", "20"], 1, "B"),
        ({"1": "Ulm", "2": "Bonn"}, "2", "2"),
        (["Ulm", "Bonn"], "Bonn", "Bonn"),
        (["Ulm", "Bonn"], 2, "an index from 0 to 1"),
        (["0", "2", "1"], 2, "the text of one choice and the index of another"),
        (["0", "1"], 1, "1"),
    ],
)
def test_an_answer_that_is_an_index_becomes_its_letter(
    tmp_path: Path, choices: object, answer: object, expected: str
) -> None:
    row = {"question": "Which city?", "choices": choices, "answer": answer}
    if "index" in expected:
        with pytest.raises(DataError, match=expected):
            supervised(tmp_path, row)
        return
    example, _ = supervised(tmp_path, row)
    assert isinstance(example, Demonstration)
    assert example.answer == expected


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": ASKED, "context": HELD, "output": SAID}, {"context": None}, ASKED),
        ({"instruction": ASKED, "notes": HELD, "output": SAID}, {"context": "notes"}, BELOW),
        ({"question": ASKED, "notes": HELD, "answer": SAID}, {"context": "notes"}, BELOW),
        (CITIES | {"choices": [["Ulm"]]}, {"choices": None}, "Which city?"),
    ],
)
def test_the_user_decides_what_is_context(tmp_path: Path, row: Any, columns: Any, expected: str) -> None:
    example, told = supervised(tmp_path, row, columns)
    assert asked(example) == expected
    left = [name for role, name in (("context", "context"), ("choices", "choices")) if columns.get(role, "") is None]
    assert told == "2 rows read, 2 used" + "".join(f"; not read: {name}" for name in left)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": ASKED, "context": {"title": ["a"], "sentences": [["b"]]}, "answer": SAID}, "context"),
        (CITIES | {"choices": [["Ulm"]]}, "choices"),
        (CITIES | {"choices": {"text": ["Ulm", "Bonn"], "label": ["A"]}}, "choices"),
    ],
)
def test_context_of_another_form_is_refused_with_the_way_out(tmp_path: Path, row: Any, field: str) -> None:
    with pytest.raises(DataError) as caught:
        supervised(tmp_path, row)
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.field) == (1, field)
    assert f'"{field}": null' in diagnostic.hint


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"instruction": ASKED, "response": SAID, "category": "closed_qa", "source": "x"}, "category, source"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "context": HELD},
         "context"),
        ({"prompt": "17 + 26 =", "completion": " 43", "context": HELD}, "context"),
        ({"text": "a", "title": "b"}, "title"),
        ({"problem": ASKED, "answer": SAID, "level": 3, "a, b": 1}, "level, 'a, b'"),
        ({"question": ASKED, "context": HELD, "schema": "x", "answer": SAID}, "schema"),
    ],
)  # fmt: skip
def test_columns_that_no_role_reads_are_named(tmp_path: Path, row: Any, left: str) -> None:
    assert supervised(tmp_path, row)[1] == f"2 rows read, 2 used; not read: {left}"


@pytest.mark.parametrize("images", [["a.png"], [{"bytes": None, "path": "a.png"}], "a.png", None, []])
def test_images_beside_messages_are_refused(tmp_path: Path, images: object) -> None:
    talk = {"messages": [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]}
    pair = {"prompt": "<image> a", "chosen": "b", "rejected": "c"}
    file, pairs = (
        write(tmp_path / "a.jsonl", talk | {"images": images}),
        write(tmp_path / "b.jsonl", pair | {"image": images}),
    )
    if not images:
        assert (
            read_supervised(read(file), {}, step_format=THINK)[1].summary() == "1 rows read, 1 used; not read: images"
        )
        return
    for reading, field in (
        (lambda: read_supervised(read(file), {}, step_format=THINK), "images"),
        (lambda: read_comparisons(read(pairs), {}), "image"),
        (lambda: read_prompts(read(pairs), {}), "image"),
    ):
        with pytest.raises(DataError) as caught:
            reading()
        assert (caught.value.diagnostics[0].line, caught.value.diagnostics[0].field) == (1, field)


def test_a_column_that_only_some_rows_have_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0, "source": "x"}]
    _, report = read_labeled(read(write(tmp_path / "a.jsonl", *rows)), {})
    assert report.summary() == "2 rows read, 2 used; not read: source"
    assert report.columns == {"text": "text", "label": "label"}


def run_summary(words: PromptContent) -> str:
    return words if isinstance(words, str) else words[-1].content


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ASKED, "context": HELD, "chosen": SAID, "rejected": "In 1901."}, BELOW),
        ({"question": ASKED, "passage": HELD, "responses": [SAID, "No."], "scores": [1, 0]}, BELOW),
        ({"prompt": "Which city?", "choices": ["Ulm", "Bonn"], "chosen": "B", "rejected": "A"}, LETTERED),
    ],
)
def test_preferences_and_prompts_hold_their_context(tmp_path: Path, row: Any, expected: str) -> None:
    file = write(tmp_path / "a.jsonl", row | {"id": 3})
    pairs, report = read_comparisons(read(file), {})
    assert run_summary(pairs[0].prompt) == expected
    assert report.summary() == "1 rows read, 1 used; not read: id"
    prompts, report = read_prompts(read(file), {})
    assert run_summary(prompts[0].prompt) == expected
    assert report.summary() == "1 rows read, 1 used; not read: id"


def test_context_beside_messages_is_refused(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": ASKED}], "context": HELD, "chosen": SAID, "rejected": "No."}
    with pytest.raises(DataError, match="the whole prompt in the messages") as caught:
        read_comparisons(read(write(tmp_path / "a.jsonl", row)), {})
    assert '"context": null' in caught.value.diagnostics[0].hint
