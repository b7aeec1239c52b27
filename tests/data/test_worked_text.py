"""Worked problems in a .txt file: how they are read, where mistakes are reported, and the examples that result."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopos.config.chain_of_thought import ReasoningDataSection
from loopos.config.diagnostics import DataError
from loopos.data.demonstrations import Demonstration
from loopos.data.rows import Row, read
from loopos.data.supervised import load_supervised

TWO = """
Problem: What is 17 + 26?
7 + 6 = 13, carry 1
1 + 2 + 1 = 4
Answer: 43

Problem: What is 2 + 2?
Answer: 4
"""
FIRST, SECOND = (
    {"problem": "What is 17 + 26?", "reasoning": ["7 + 6 = 13, carry 1", "1 + 2 + 1 = 4"], "answer": "43"},
    {"problem": "What is 2 + 2?", "reasoning": [], "answer": "4"},
)


def rows_of(folder: Path, text: str) -> list[Row]:
    file = folder / "a.txt"
    file.write_bytes(text.encode())
    return list(read(str(file)))


def test_problems_steps_and_answers_with_their_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, TWO)
    assert [(row.values, row.line, row.index) for row in rows] == [(FIRST, 2, 0), (SECOND, 7, 1)]
    reader = read(str(tmp_path / "a.txt"))
    list(reader)
    assert reader.report.summary == [f"{tmp_path}/a.txt: read as worked problems, by its content"]
    assert (reader.report.rows_read, reader.report.blank_lines) == (2, 2)


@pytest.mark.parametrize(
    "text",
    [
        TWO.replace("\n", "\r\n"),
        TWO.replace("\n\n", "\n"),
        TWO.replace("\n", "\n\n"),
        TWO.replace("Problem:", "Question:").replace("Answer:", "Final answer:"),
        TWO.replace("Problem:", "Q:").replace("Answer:", "A:"),
        TWO.replace("Problem:", "PROBLEM 12 :").replace("Answer:", "answer:"),
        TWO.replace("7 + 6", "Reasoning:\n7 + 6"),
        TWO.replace("7 + 6", "Steps: 7 + 6"),
        TWO.replace("Problem: ", "Problem:\n").replace("7 + 6", "Solution:\n7 + 6").replace("\nAnswer: 4\n", "\nReasoning:\nAnswer: 4\n"),
        TWO.replace("Problem: ", "Problem:\n").replace("Answer: ", "Answer:\n"),
        TWO.replace("\n", "\n  ").rstrip(" "),
    ],
)  # fmt: skip
def test_other_ways_to_write_the_same(text: str, tmp_path: Path) -> None:
    assert [row.values for row in rows_of(tmp_path, text)] == [FIRST, SECOND]


def test_a_problem_of_several_lines_with_options(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "Problem: Which is even?\nA: 3\nB: 4\nReasoning:\n4 = 2 + 2\nAnswer: B\n")
    assert row.values == {"problem": "Which is even?\nA: 3\nB: 4", "reasoning": ["4 = 2 + 2"], "answer": "B"}


def test_more_steps_than_are_looked_at(tmp_path: Path) -> None:
    steps = "".join(f"step {number}\n" for number in range(300))
    (row,) = rows_of(tmp_path, f"Problem: p\nReasoning:\n{steps}Answer: 4\n")
    assert row.values["reasoning"] == [f"step {number}" for number in range(300)]


@pytest.mark.parametrize(
    ("text", "line", "field", "piece"),
    [
        ("Problem: p\nstep\n\nProblem: q\nAnswer: 2\n", 1, "answer", "a problem without answer"),
        ("Problem: p\nAnswer:\n\nProblem: q\nAnswer: 2\n", 1, "answer", "a problem without answer"),
        ("Problem: p\nAnswer: 1\n\nProblem:\nAnswer: 2\n", 4, "problem", "a problem without problem"),
        ("Problem: p\nAnswer: 1\n\nWhat is q?\nAnswer: 2\n", 4, "answer", "'What is q?' after the answer"),
        ("Problem: p\nAnswer: 1\nAnswer: 2\n", 3, "answer", "a second answer"),
        ("Problem: p\nReasoning: a\nSteps: b\nAnswer: 2\n", 3, "reasoning", "a second reasoning"),
        (
            "Dear reader,\nProblem: p\nAnswer: 2\n",
            1,
            "format",
            "expected JSON Lines, CSV or TSV with a header line, or worked",
        ),
        ("Problem: p\nstep\n", 1, "format", "worked problems (Problem: ..., its steps, Answer: ...)"),
    ],
)
def test_diagnostics_name_their_line(text: str, line: int, field: str, piece: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, text)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.source, diagnostic.line, diagnostic.field) == (f"{tmp_path}/a.txt", line, field)
    assert piece in str(diagnostic)


def test_bad_problems_are_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TWO + "\nProblem: never answered\n\n" + TWO)
    reader = read(str(file), on_bad_row="skip")
    assert [row.line for row in reader] == [2, 7, 13, 18]
    assert (reader.report.rows_read, reader.report.bad_rows) == (5, 1)
    assert [diagnostic.line for diagnostic in reader.report.diagnostics] == [10]


@pytest.mark.parametrize(
    "text",
    [
        TWO,
        '{"problem": "What is 17 + 26?", "reasoning": "7 + 6 = 13, carry 1\\n1 + 2 + 1 = 4", "answer": 43}\n{"problem": "What is 2 + 2?", "reasoning": [], "answer": "4"}\n',
        '[{"problem": "What is 17 + 26?", "reasoning": ["7 + 6 = 13, carry 1", "1 + 2 + 1 = 4"], "answer": 43},\n {"problem": "What is 2 + 2?", "reasoning": [], "answer": 4}]\n',
        'question\tsolution\nWhat is 17 + 26?\t"7 + 6 = 13, carry 1\n1 + 2 + 1 = 4\n#### 43"\nWhat is 2 + 2?\t#### 4\n',
    ],
)
def test_a_txt_file_as_reasoning_examples_whatever_it_holds(text: str, tmp_path: Path) -> None:
    file = tmp_path / "reasoning_examples.txt"
    file.write_text(text)
    section = ReasoningDataSection(
        pretrained_weights="new", output_dir="run", reasoning_examples=str(file), validation_share=0
    )
    data = load_supervised(section, seed=1)
    assert [
        (example.problem, list(example.steps), example.answer)
        for example in data.train
        if isinstance(example, Demonstration)
    ] == [tuple(expected.values()) for expected in (FIRST, SECOND)]
