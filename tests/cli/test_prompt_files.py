"""Prompts in any shape are read wherever prompts are: lines, rows, comparisons, and what `generate` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.prompts import read_prompts
from loopos.config.diagnostics import DataError
from loopos.config.reward_model import PreferenceDataSection
from loopos.config.rl import PpoDataSection
from loopos.data.conversations import Message
from loopos.data.preference_data import load_comparisons, load_prompts
from loopos.data.prompts import prompt_text
from tests.cli.conftest import Invoke, write_jsonl

ASKED = ["Write a poem, please.", "Tell a joke."]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell a joke."}]
SHAPES: dict[str, tuple[str, list[dict[str, Any]] | str]] = {
    "lines": ("a.txt", "Write a poem, please.\nTell a joke.\n"),
    "lines that look like a table": ("a.txt", "poem, joke\npoem, song\n"),
    "prompts": ("a.jsonl", [{"prompt": each} for each in ASKED]),
    "questions": ("a.jsonl", [{"question": each} for each in ASKED]),
    "user messages": ("a.jsonl", [{"messages": [{"role": "user", "content": each}]} for each in ASKED]),
    "chats": (
        "a.jsonl",
        [{"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": "no"}]} for each in ASKED],
    ),
    "comparisons": ("a.jsonl", [{"prompt": each, "chosen": "a", "rejected": "b"} for each in ASKED]),
    "samples": (
        "a.jsonl",
        [
            {"prompt": each, "text": f"t{n}", "sample": n, "tokens": 2, "logprob": -1.0}
            for each in ASKED
            for n in range(3)
        ],
    ),
    "samples in messages": ("a.jsonl", [{"prompt": CHAT, "text": f"t{n}", "sample": n} for n in range(3)]),
    "problems": ("a.jsonl", [{"problem": each, "answer": "x"} for each in ASKED]),
    "worked": ("a.txt", "Problem: Tell a joke.\nAnswer: no\n"),
}
EXPECTED = {
    "lines that look like a table": ["poem, joke", "poem, song"],
    "samples in messages": ["system: Be kind.\n\nuser: Tell a joke."],
    "worked": ["Tell a joke."],
}


def _write(folder: Path, name: str) -> Path:
    file, content = SHAPES[name]
    if isinstance(content, str):
        (folder / file).write_text(content)
        return folder / file
    return write_jsonl(folder / file, content)


@pytest.mark.parametrize("name", SHAPES)
def test_ppo_reads_them(name: str, tmp_path: Path) -> None:
    section = PpoDataSection.model_validate({"pretrained_weights": "new", "output_dir": "run", "validation_share": 0})
    found = load_prompts(section, str(_write(tmp_path, name)), seed=1)
    assert [prompt_text(each.prompt) for each in found.train] == EXPECTED.get(name, ASKED)
    if name.startswith("lines"):
        assert [each.row.line for each in found.train] == [1, 2]
        assert found.summary[0].endswith("a.txt: read as one prompt per line")


@pytest.mark.parametrize("name", SHAPES)
def test_generate_and_winrate_read_them(name: str, tmp_path: Path) -> None:
    found = read_prompts(str(_write(tmp_path, name)), {}, raw=False)
    assert [prompt_text(each.content) for each in found] == EXPECTED.get(name, ASKED)


def test_blank_lines_between_prompts_are_counted_by_ppo(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\nWrite a poem.\n\n\nTell a joke.\n")
    section = PpoDataSection.model_validate({"pretrained_weights": "new", "output_dir": "run"})
    found = load_prompts(section, str(tmp_path / "a.txt"), seed=1)
    assert sorted(each.row.line for each in [*found.train, *found.validation]) == [2, 5]


def test_the_output_of_generate_is_accepted_as_prompts(invoke: Invoke, language_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("where is it?\nhow late is it?\n")
    options = ("-n", 2, "--temperature", 1, "--max-new-tokens", 3, "--device", "cpu")
    samples = tmp_path / "samples.jsonl"
    result = invoke("generate", language_run, "--input", prompts, *options, "--system", "Be kind.", "-o", samples)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    system = {"role": "system", "content": "Be kind."}
    assert [row["prompt"] for row in rows[::2]] == [
        [system, {"role": "user", "content": "where is it?"}],
        [system, {"role": "user", "content": "how late is it?"}],
    ]
    assert [row["sample"] for row in rows] == [0, 1, 0, 1]
    assert all(isinstance(row["text"], str) for row in rows)
    again = read_prompts(str(samples), {}, raw=False)
    assert [each.problem for each in again] == [
        (Message("system", "Be kind."), Message("user", text)) for text in ("where is it?", "how late is it?")
    ]
    plain = invoke("generate", language_run, "--input", prompts, *options, "--json")
    assert [json.loads(line)["prompt"] for line in plain.stdout.splitlines()][::2] == [
        "where is it?",
        "how late is it?",
    ]


def test_methods_without_prompts_refuse_plain_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Write a poem, please.\nTell a joke.\n")
    section = PreferenceDataSection.model_validate({"pretrained_weights": "new", "output_dir": "run"})
    with pytest.raises(DataError, match="plain text"):
        load_comparisons(section, str(tmp_path / "a.txt"), seed=1)


@pytest.mark.parametrize(
    ("row", "expected", "beside"),
    [
        (
            {"problem": "2 + 2", "reasoning": ["2 and 2"], "answer": 4, "level": 1},
            "4",
            {"reasoning", "answer", "level"},
        ),
        # GSM8K: the answer ends the solution.
        ({"question": "2 + 2", "answer": "2 and 2\n#### 4"}, "4", {"answer"}),
        # The index of a choice is its letter, as the prompt shows it.
        ({"question": "2 + 2", "choices": ["3", "4"], "answer": 1}, "B", {"answer"}),
        # verl and TRL: messages with an answer to check.
        ({"prompt": [{"role": "user", "content": "2 + 2"}], "answer": "4"}, "4", {"answer"}),
        ({"messages": [{"role": "user", "content": "2 + 2"}], "Answer": 4}, "4", {"Answer"}),
        ({"prompt": "2 + 2", "chosen": "4", "rejected": "5"}, None, {"chosen", "rejected"}),
        ({"prompt": "2 + 2"}, None, set()),
    ],
)
def test_a_prompt_has_its_row_and_the_answer_that_it_expects(
    row: dict[str, Any], expected: str | None, beside: set[str], tmp_path: Path
) -> None:
    (found,) = read_prompts(str(write_jsonl(tmp_path / "a.jsonl", [row])), {}, raw=False)
    assert found.text.startswith("2 + 2")
    assert found.expected == expected
    assert found.row is not None
    assert found.row.values == row
    assert set(row) - set(found.columns) == beside
