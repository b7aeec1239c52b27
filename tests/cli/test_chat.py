"""`loopos chat` fed line by line: history, commands, limits, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, Reference

WORDS = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "8")


@pytest.fixture
def chat(language_run: Path, invoke: Invoke) -> Any:
    """`chat("a line", "another")`: the result of a whole chat."""

    def talk(*lines: str, words: tuple[Any, ...] = WORDS) -> Any:
        result = invoke("chat", language_run, *words, text="".join(f"{line}\n" for line in lines))
        assert result.exit_code == 0, result.stderr
        return result

    return talk


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_each_turn_sees_those_before_it(chat: Any, greedy: Reference) -> None:
    first = greedy([turn("user", "the film")], 8)
    second = greedy([turn("user", "the film"), turn("assistant", first), turn("user", "my card")], 8)
    result = chat("the film", "", "my card")
    assert result.stdout == f"{first}\n{second}\n"
    assert second != greedy([turn("user", "my card")], 8)


def test_the_history_is_not_computed_again(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loopos.generation.engine import Engine
    from loopos.generation.rows import CachedRows

    fed: list[int] = []
    extend = CachedRows.extend

    def counted(self: Any, rows: Any, tokens: Any) -> Any:
        fed.append(sum(map(len, tokens)))
        return extend(self, rows, tokens)

    monkeypatch.setattr(CachedRows, "extend", counted)
    lines = ("the film was slow but the ending is lovely", "again")
    with_cache = chat(*lines).stdout
    *_, first, second = fed
    monkeypatch.setattr(Engine, "reuse_prefixes", lambda self: nullcontext())
    assert chat(*lines).stdout == with_cache
    # Without the cache the second turn feeds the first turn's words, and what was said to them, once more.
    assert first == fed[-2]
    assert second <= fed[-1] - first


def test_clear_and_system(chat: Any, greedy: Reference) -> None:
    result = chat("the film", "/clear", "my card", "/clear", "/system be kind", "my card")
    told = [turn("system", "be kind"), turn("user", "my card")]
    expected = [greedy([turn("user", "the film")], 8), greedy([turn("user", "my card")], 8), greedy(told, 8)]
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert chat("my card", words=(*WORDS, "--system", "be kind")).stdout == f"{expected[2]}\n"


def test_temperature_and_commands_that_are_none(chat: Any, greedy: Reference) -> None:
    result = chat(
        "/temp hot", "/temp -1", "/nothing", "/save", "/save x.txt", "/temp 0", "my card", words=("--device", "cpu")
    )
    assert result.stdout.startswith(greedy([turn("user", "my card")], 8))
    for summary in ("/temp: got hot", "temperature: got -1", "/nothing: unknown command", "/save: no file"):
        assert summary in result.stderr


def test_help_and_quit(chat: Any) -> None:
    result = chat("/help", "/quit", "never said")
    for command in ("/help", "/system", "/temp", "/clear", "/save", "/steps", "/quit"):
        assert command in result.stdout
    assert len(result.stdout.splitlines()) == 7


def test_steps_are_shown_while_expected(chat: Any, greedy: Reference) -> None:
    text = greedy([turn("user", "the film")], 8)
    result = chat("/steps", "the film")
    assert result.stdout.startswith(f"{text}\n")
    assert "answer: " in result.stdout
    assert "answer: " not in chat("/steps", "/steps", "the film").stdout


def test_saved_conversations_are_read_back_as_training_data(chat: Any, tmp_path: Path, greedy: Reference) -> None:
    from loopos.data import rows
    from loopos.data.conversations import Conversation
    from loopos.data.step_format import StepFormat
    from loopos.data.supervised_rows import read_supervised

    file = tmp_path / "said.jsonl"
    chat("/system be kind", "the film", f"/save {file}", "my card", f"/save {file}")
    saved = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [len(line["messages"]) for line in saved] == [3, 5]
    answer = greedy([turn("system", "be kind"), turn("user", "the film")], 8)
    assert saved[0]["messages"] == [turn("system", "be kind"), turn("user", "the film"), turn("assistant", answer)]
    examples, report = read_supervised(rows.read(str(file)), {}, step_format=StepFormat())
    assert (report.read, report.used) == (2, 2)
    assert all(isinstance(example, Conversation) for example in examples)


def test_an_overlong_history_drops_its_oldest_turns_and_reports_it(chat: Any) -> None:
    """The pico model has 256 positions; each line takes about fifty."""
    line = "never again: cold food and a rude waiter, where is the invoice for march, it broke after two days"
    result = chat(*[line] * 8)
    assert "the oldest" in result.stderr
    assert "256 positions" in result.stderr
    assert len(result.stdout.splitlines()) >= 8


def test_a_line_that_is_too_long_is_refused_and_the_chat_continues(chat: Any, greedy: Reference) -> None:
    result = chat("q " * 300, "my card")
    assert "send a shorter message" in result.stderr
    assert result.stdout == greedy([turn("user", "my card")], 8) + "\n"


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    chat: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, greedy: Reference
) -> None:
    from loopos.generation.engine import Engine

    stream, file = Engine.stream, tmp_path / "said.jsonl"

    def pressed(self: Any, *actual: Any, **named: Any) -> Iterator[Any]:
        for number, piece in enumerate(stream(self, *actual, **named), start=1):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(Engine, "stream", pressed)
    result = chat("the film", f"/save {file}")
    assert "(interrupted" in result.stderr
    kept = json.loads(file.read_text(encoding="utf-8"))["messages"][1]["content"]
    whole = greedy([turn("user", "the film")], 8)
    assert kept
    assert whole.startswith(kept)
    assert kept != whole


def test_a_note_on_an_answer_has_its_own_line(chat: Any) -> None:
    """Also where both streams go into one pipe."""
    lines = chat("hello\n").output.splitlines()
    assert [line for line in lines if "cut at" in line] == [line for line in lines if line.startswith("note: cut at")]
    assert any(line.startswith("note: cut at") for line in lines)
