"""Columns to formats, rows to demonstrations, conversations, completions and texts; what is dropped is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.config.diagnostics import DataError
from loopos.data.conversations import Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.reading import DataReport
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS, StepFormat
from loopos.data.supervised import load_supervised
from loopos.data.supervised_rows import Completion, Example, PlainText, detect, read_supervised

THINK = NAMED_FORMATS["think"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def examples_of(
    tmp_path: Path, *rows: dict[str, Any], columns: dict[str, str] | None = None, form: StepFormat = THINK
) -> list[Example]:
    return read_supervised(read(write(tmp_path / "rows.jsonl", list(rows))), columns or {}, step_format=form)[0]


def diagnostics_of(tmp_path: Path, *rows: dict[str, Any], columns: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        examples_of(tmp_path, *rows, columns=columns)
    return [str(diagnostic) for diagnostic in caught.value.diagnostics]


@pytest.mark.parametrize(
    ("columns", "kind", "roles"),
    [
        ("problem reasoning answer", "demonstrations", "problem answer reasoning"),
        ("question answer", "demonstrations", "question answer -"),
        ("Question Rationale Final-Answer", "demonstrations", "Question Final-Answer Rationale"),
        ("prompt chain_of_thought answer id", "demonstrations", "prompt answer chain_of_thought"),
        ("problem solution answer source", "demonstrations", "problem answer solution"),
        ("question solution", "demonstrations", "question - solution"),
        ("messages", "conversations", "messages"),
        ("id conversations", "conversations", "conversations"),
        ("prompt prompt_id messages", "conversations", "messages"),
        ("instruction input output", "instructions", "instruction output input"),
        ("instruction output text", "instructions", "instruction output"),
        ("instruction input output system history", "instructions", "instruction output input history system"),
        ("prompt completion", "completions", "prompt completion"),
        ("text", "text", "text"),
        ("url text", "text", "text"),
    ],
)
def test_columns_of_common_data_sets(columns: str, kind: str, roles: str) -> None:
    found = detect(columns.split(), {})
    assert found.kind == kind
    assert list(found.columns.values()) == [name for name in roles.split() if name != "-"]


def test_the_choice_is_reported_and_can_be_overridden() -> None:
    assert (
        detect(["question", "answer"], {}).summary
        == 'format: demonstrations (problem <- "question", answer <- "answer")'
    )
    chosen = detect(["q", "a", "messages"], {"problem": "q", "answer": "a"})
    assert (chosen.kind, dict(chosen.columns)) == ("demonstrations", {"problem": "q", "answer": "a"})
    assert detect(["a", "prompt", "text"], {"completion": "a"}).kind == "completions"


@pytest.mark.parametrize(
    ("columns", "overrides", "field", "piece"),
    [
        ("messages prompt completion", {}, "data.columns", "conversations and completions"),
        ("question answer final_answer", {}, "data.columns.answer", "answer, final_answer"),
        ("title body", {}, "data.columns", "these columns make no known format"),
        ("question answer", {"problm": "question"}, "data.columns.problm", "did you mean problem?"),
        ("question answer", {"problem": "qestion"}, "data.columns.problem", 'did you mean "question"?'),
        (
            "question answer",
            {"problem": "answer", "answer": "answer"},
            "data.columns.answer",
            "which also has the role problem",
        ),
        ("a b", {"problem": "a", "completion": "b"}, "data.columns", "roles of one format"),
    ],
)
def test_columns_that_are_no_format(columns: str, overrides: dict[str, str], field: str, piece: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(columns.split(), overrides, source="rows.csv")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.field) == ("rows.csv", field)
    assert piece in str(diagnostic)


@pytest.mark.parametrize(
    ("row", "steps", "answer"),
    [
        ({"problem": "p", "reasoning": ["a ", "b"], "answer": "7"}, ("a", "b"), "7"),
        ({"problem": "p", "reasoning": "a\n\nb\r\n", "answer": 7}, ("a", "b"), "7"),
        ({"problem": "p", "reasoning": [], "answer": 2.5}, (), "2.5"),
        ({"problem": "p", "answer": " yes "}, (), "yes"),
        ({"question": "p", "answer": "a <<1+1=2>>\nb\n#### 7"}, ("a <<1+1=2>>", "b"), "7"),
        ({"question": "p", "answer": "#### 7"}, (), "7"),
        ({"question": "p", "solution": "a\nb #### 7"}, ("a", "b"), "7"),
        ({"question": "p", "solution": ["a", "#### 7"]}, ("a",), "7"),
        ({"question": "p", "rationale": "a", "answer": "#### 7"}, ("a",), "7"),
    ],
)
def test_demonstrations(tmp_path: Path, row: dict[str, Any], steps: tuple[str, ...], answer: str) -> None:
    (example,) = examples_of(tmp_path, row)
    assert isinstance(example, Demonstration)
    assert (example.problem, example.steps, example.answer, example.row.line) == ("p", steps, answer, 1)


def test_one_text_is_split_at_the_delimiter_of_the_format(tmp_path: Path) -> None:
    form = StepFormat(delimiter="\n\n")
    (example,) = examples_of(tmp_path, {"problem": "p", "steps": "a\nb\n\nc", "answer": "7"}, form=form)
    assert isinstance(example, Demonstration)
    assert example.steps == ("a\nb", "c")


@pytest.mark.parametrize(
    ("row", "field", "piece"),
    [
        ({"problem": " ", "reasoning": ["a"], "answer": "7"}, "problem", "got ' '"),
        ({"problem": "p", "reasoning": ["a", 3], "answer": "7"}, "reasoning[1]", "got 3 (a number)"),
        ({"problem": "p", "reasoning": ["a", ""], "answer": "7"}, "reasoning[1]", "got ''"),
        ({"problem": "p", "reasoning": None, "answer": "7"}, "reasoning", "an empty list means an answer without"),
        ({"problem": "p", "reasoning": {"a": 1}, "answer": "7"}, "reasoning", "(an object)"),
        ({"problem": "p", "reasoning": ["a\nb"], "answer": "7"}, "reasoning", "step 1 holds the delimiter '\\n'"),
        ({"problem": "p", "reasoning": ["a"], "answer": None}, "answer", "got null"),
        ({"problem": "p", "reasoning": ["a"], "answer": True}, "answer", "got True (true or false)"),
        ({"problem": "p", "reasoning": ["a"], "answer": "b #### 7"}, "answer", "with reasoning before ####"),
        ({"problem": "p", "reasoning": ["a"], "answer": ""}, "answer", "got ''"),
        ({"problem": "p", "reasoning": ["\ud800"], "answer": "7"}, "reasoning[0]", "half of a surrogate pair"),
    ],
)
def test_bad_demonstrations_name_line_and_field(tmp_path: Path, row: dict[str, Any], field: str, piece: str) -> None:
    good = {"problem": "p", "reasoning": ["a"], "answer": "7"}
    (diagnostic,) = diagnostics_of(tmp_path, good, row)
    assert diagnostic.startswith(f"{tmp_path}/rows.jsonl:2: {field}: got ")
    assert piece in diagnostic


def test_a_solution_without_hashes_needs_an_answer_column(tmp_path: Path) -> None:
    (diagnostic,) = diagnostics_of(tmp_path, {"question": "p", "solution": "a\nb"})
    assert "expected #### answer in the last line" in diagnostic
    assert 'data.columns: {"answer": "COLUMN"}' in diagnostic


CONVERSATIONS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    (
        {"instruction": "a", "input": "x", "output": "b", "system": ""},
        [("user", "a\nx"), ("assistant", "b")],
    ),
    (
        {"instruction": "a", "input": "", "output": "b", "history": [["p", "q"]]},
        [("user", "p"), ("assistant", "q"), ("user", "a"), ("assistant", "b")],
    ),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
]


@pytest.mark.parametrize(("row", "messages"), CONVERSATIONS)
def test_conversations(tmp_path: Path, row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    (example,) = examples_of(tmp_path, row)
    assert isinstance(example, Conversation)
    assert [(message.role, message.content) for message in example.messages] == messages
    assert example.num_prompt == (1 if "completion" in row else 0)


def test_weights_and_other_keys_of_a_message(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    (example,) = examples_of(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": "a", "weight": 0, "name": "Ida"},
                {"role": "assistant", "content": None, "tool_calls": call, "weight": 0},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "b", "weight": 0.5},
                {"role": "assistant", "content": "c", "weight": None},
            ]
        },
    )
    assert isinstance(example, Conversation)
    assert [message.weight for message in example.messages] == [1.0, 0.0, 1.0, 0.5, 1.0]
    assert example.messages[0].as_template() == {"role": "user", "content": "a", "name": "Ida"}
    assert example.messages[1].as_template() == {"role": "assistant", "content": "", "tool_calls": call}


@pytest.mark.parametrize(
    ("messages", "field", "piece"),
    [
        ([], "messages", "an empty list"),
        ("hello", "messages", "use JSON Lines or parquet"),
        ([["user", "a"]], "messages[0]", "(a list)"),
        ([{"content": "a"}], "messages[0]", "an object with 'content'"),
        ([{"role": "narrator", "content": "a"}], "messages[0].role", "'narrator'"),
        ([{"role": "user", "content": "a"}], "messages", "no assistant message: nothing to learn (roles: user)"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "messages[1].content", "''"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "messages[0].content", "null"),
        ([{"role": "assistant", "content": "a", "weight": -1}], "messages[0].weight", "a number >= 0"),
        ([{"role": "assistant", "content": "a", "weight": True}], "messages[0].weight", "a number >= 0"),
        ([{"role": "user", "content": "a", "weight": 1}], "messages[0].weight", "on a message of the user"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "messages[0].content[0]", "the type 'image'"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: object, field: str, piece: str) -> None:
    diagnostic = diagnostics_of(tmp_path, {"messages": messages})[0]
    assert diagnostic.startswith(f"{tmp_path}/rows.jsonl:1: {field}: ")
    assert piece in diagnostic


def test_completions_and_texts(tmp_path: Path) -> None:
    (pair,) = examples_of(tmp_path, {"prompt": "2+2=", "completion": " 4"})
    assert isinstance(pair, Completion)
    assert (pair.prompt, pair.completion) == ("2+2=", " 4")
    (text,) = examples_of(tmp_path, {"text": " as it stands\n"})
    assert isinstance(text, PlainText)
    assert text.text == " as it stands\n"
    (diagnostic,) = diagnostics_of(tmp_path, {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]})
    assert "text as prompt and a list as completion" in diagnostic


def test_read_is_used_and_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "p", "reasoning": ["a"], "answer": "1"},
        {"problem": "", "reasoning": ["a"], "answer": "1"},
        {"problem": "p", "reasoning": ["a\nb"], "answer": "1"},
        {"problem": "p", "reasoning": ["</think>"], "answer": "1"},
        {"problem": "p", "reasoning": "a", "answer": None},
        {"problem": "p", "answer": "1"},
    ]
    path = Path(write(tmp_path / "rows.jsonl", rows))
    path.write_text(path.read_text() + "{oops\n")
    examples, report = read_supervised(read(str(path), on_bad_row="skip"), {}, step_format=THINK)
    assert [example.row.line for example in examples] == [1]
    assert report.dropped == {
        "unreadable row": 1, "problem is blank": 1, "reasoning does not fit the step format": 2, "answer is null": 1,
        "reasoning is blank": 1,
    }  # fmt: skip
    assert (report.read, report.used) == (7, 1)
    assert len(report.diagnostics) == 6
    assert isinstance(report, DataReport)


def test_no_row_left_is_a_diagnostic(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"problem": "", "answer": "1"}])
    with pytest.raises(DataError, match="1 rows, none of which can be used"):
        read_supervised(read(path, on_bad_row="skip"), {}, step_format=THINK)


def test_training_and_validation_rows(tmp_path: Path) -> None:
    def section(**actual: object) -> ReasoningDataSection:
        return ReasoningDataSection.model_validate({"pretrained_weights": "new", "output_dir": "run", **actual})

    rows = [{"problem": f"p{number}", "reasoning": ["a"], "answer": "1"} for number in range(20)]
    path, other = write(tmp_path / "rows.jsonl", rows), write(tmp_path / "other.jsonl", rows[:3])
    split = load_supervised(section(reasoning_examples=path, validation_share=0.25), seed=1)
    assert (len(split.train), len(split.validation)) == (15, 5)
    problems = {example.problem for example in [*split.train, *split.validation] if isinstance(example, Demonstration)}
    assert len(problems) == 20
    assert split.summary[-1] == "validation: 5 of the rows, split off with seed 1; 15 train"
    again = load_supervised(section(training_data=path, validation_share=0.25), seed=1)
    assert [example.row.line for example in again.validation] == [example.row.line for example in split.validation]
    own = load_supervised(section(training_data=path, validation_data=other, step_format="hashes"), seed=1)
    assert (len(own.train), len(own.validation)) == (20, 3)
    assert own.step_format == NAMED_FORMATS["hashes"]
    assert len(load_supervised(section(training_data=path, validation_share=0), seed=1).validation) == 0
