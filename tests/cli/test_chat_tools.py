"""`loopos chat --environment`: calls are made, their results answered, and the history is what training reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopos.generation.completions import TokenDelta
from tests.cli.conftest import Invoke
from tests.data.chat_templates import HERMES

SHORT = HERMES.replace("<|im_start|>", "#").replace("<|im_end|>", "<eos>")
CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "2 + 3"}}\n</tool_call>'
OPTIONS = ("--device", "cpu", "--max-new-tokens", "4")


PROMPTS: list[str] = []
"""Of the turns of a test."""


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory, pico_folder: Path) -> Path:
    """A random model with many positions, whose template writes tools."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tools")
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(pico_folder)
    config.max_position_embeddings = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Turns that the model writes, in place of what it would."""
    from loopos.generation.engine import Engine

    turns: list[str] = []
    PROMPTS.clear()

    def stream(self: Any, prompt: list[list[int]], settings: Any) -> Iterator[TokenDelta]:
        PROMPTS.append(self.tokenizer.decode(prompt[0]))
        yield TokenDelta(0, 0, 5, turns.pop(0), 0.0, "stop")

    monkeypatch.setattr(Engine, "stream", stream)
    return turns


def test_a_call_is_made_and_its_result_answered(
    tool_model: Path, tmp_path: Path, invoke: Invoke, script: list[str]
) -> None:
    script += [CALL, "It is 5.", "Bye."]
    saved = tmp_path / "talk.jsonl"
    lines = f"what is 2 + 3?\nthanks\n/save {saved}\n"
    result = invoke("chat", tool_model, "--environment", "calculator_search", *OPTIONS, text=lines)
    assert result.exit_code == 0, result.stderr
    assert "tools: calculate, search; calls are read by the parser hermes" in result.stderr
    assert '[calculate({"expression": "2 + 3"}) -> \'5\']\nIt is 5.\nBye.\n' in result.stdout
    assert "<tool_response>\n5\n</tool_response><eos>\n#assistant\n" in PROMPTS[1]
    row = json.loads(saved.read_text())
    assert [message["role"] for message in row["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert row["messages"][1]["tool_calls"][0]["function"] == {
        "name": "calculate",
        "arguments": {"expression": "2 + 3"},
    }
    assert [tool["function"]["name"] for tool in row["tools"]] == ["calculate", "search"]


def test_a_row_starts_an_episode_that_can_be_cleared(tool_model: Path, invoke: Invoke, script: list[str]) -> None:
    script += ['<tool_call>{"name": "dig", "arguments": {}}</tool_call>', "Nothing.", "Again."]
    row = '{"seed": 1}'
    result = invoke("chat", tool_model, "--environment", "treasure_grid", "--row", row, *OPTIONS, text="/clear\nhi\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("user: You stand on a grid of 4 x 4 squares")
    assert "[dig({}) -> 'There is nothing here.']\nNothing.\nAgain.\n" in result.stdout
    assert "There is nothing here." in PROMPTS[1]
    assert "There is nothing here." not in PROMPTS[2]


def test_calls_without_an_end_are_stopped(tool_model: Path, invoke: Invoke, script: list[str]) -> None:
    script += [CALL] * 8
    result = invoke("chat", tool_model, "--environment", "calculator_search", *OPTIONS, text="hi\n")
    assert result.exit_code == 0, result.stderr
    assert "note: stopped after 8 turns of calls" in result.stderr
    assert not script


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (("--row", "{}"), "--row without --environment: there are no tools"),
        (("--tool-parser", "json"), "--tool-parser without --environment"),
        (("--environment", "treasure_grid", "--row", "[1]"), "--row: got [1]; expected an object in JSON"),
        (("--environment", "treasure_grid", "--row", "{}"), "reset needs the column seed; the row has none"),
        (("--environment", "treasure"), 'got the environment "treasure"'),
        (("--environment", "treasure_grid", "--tool-parser", "hermse"), 'did you mean "hermes"'),
    ],
)  # fmt: skip
def test_mistakes(tool_model: Path, invoke: Invoke, options: tuple[str, ...], piece: str) -> None:
    result = invoke("chat", tool_model, *options, *OPTIONS, text="hi\n")
    assert result.exit_code == 2
    assert piece in result.stderr


def test_a_template_without_tools_is_refused(language_run: Path, invoke: Invoke) -> None:
    result = invoke("chat", language_run, "--environment", "calculator_search", "--device", "cpu", text="hi\n")
    assert result.exit_code == 2
    assert "chat template: the tokenizer's own: it does not write tools" in result.stderr
