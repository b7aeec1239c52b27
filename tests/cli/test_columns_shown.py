"""Columns in the output of commands: learned context is shown, and columns that no role reads are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.prompts import read_prompts
from loopos.config.diagnostics import DataError
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised, prompt_tokens
from tests.cli.conftest import Invoke, write_jsonl

ASKED, HELD, SAID = "When was the depot opened?", "The depot at Ulm was opened in 1900.", "In 1900."
DOLLY = {"instruction": ASKED, "context": HELD, "response": SAID, "category": "closed_qa"}


def config(folder: Path, weights: Path, method: str, key: str, rows: list[dict[str, Any]], **data: Any) -> Path:
    file = write_jsonl(folder / "rows.jsonl", rows)
    sections = {
        "computation": {"mode": "posttraining", "method": method},
        "training": {"learning_rate": 0.001, "batch_size": 4, "num_epochs": 1, "precision": "fp32", "device": "cpu"},
        "data": {
            "pretrained_weights": str(weights),
            key: str(file),
            "validation_share": 0,
            "output_dir": str(folder / "run"),
            **data,
        },
    }
    (folder / "config.json").write_text(json.dumps(sections), encoding="utf-8")
    return folder / "config.json"


def shown(text: str) -> str:
    """Tokens side by side as text."""
    return text.replace("|", "").replace("·", " ").replace("\\n", "\n")


def test_preview_shows_the_context_and_names_what_is_left_out(
    pico_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    path = config(tmp_path, pico_folder, "chain_of_thought", "reasoning_examples", [DOLLY] * 12)
    result = invoke("data", "preview", path, "--rows", 1)
    assert result.exit_code == 0, result.stderr
    assert f"### User:\n{ASKED}\n{HELD}\n\n### Assistant:\n[{SAID}<eos>]" in shown(result.stdout)
    assert "12 rows read, 12 used; not read: category" in result.stdout
    bare = invoke("data", "preview", path, "--rows", 1, 'data.columns={"context": null}')
    assert bare.exit_code == 0, bare.stderr
    assert f"### User:\n{ASKED}\n\n### Assistant:\n[{SAID}<eos>]" in shown(bare.stdout)
    assert "not read: context, category" in bare.stdout


def test_preview_of_comparisons_and_prompts(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    pair = {"prompt": ASKED, "context": HELD, "chosen": SAID, "rejected": "In 1901.", "source": "x"}
    path = config(tmp_path, pico_folder, "reward_model", "preference_data", [pair] * 4)
    result = invoke("data", "preview", path, "--rows", 1)
    assert result.exit_code == 0, result.stderr
    assert f"{ASKED}\n{HELD}\n\n### Assistant:\n" in shown(result.stdout)
    assert "4 rows read, 4 used; not read: source" in result.stdout
    bare = invoke("data", "preview", path, "--rows", 1, 'data.columns={"context": null}')
    assert "4 rows read, 4 used; not read: context, source" in bare.stdout, bare.stderr


def test_preview_of_tools_that_the_template_does_not_write(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    talk = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    path = config(
        tmp_path, pico_folder, "chain_of_thought", "reasoning_examples", [{"messages": talk, "tools": tools}] * 4
    )
    result = invoke("data", "preview", path, "--rows", 1)
    assert result.exit_code == 2
    assert "rows.jsonl:1: messages: got the chat template does not write the row's tools" in result.stderr
    assert 'data.columns: {"tools": null}' in result.stderr
    assert invoke("data", "preview", path, 'data.columns={"tools": null}').exit_code == 0


def test_check_and_run_name_what_is_left_out(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    rows = [{"text": f"film {i}", "label": "ab"[i % 2], "source": "x", "stars": 3} for i in range(8)]
    checked = invoke("data", "check", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "not read: source, stars" in checked.stdout
    path = config(tmp_path, pico_folder, "fine_tuning", "training_data", rows)
    result = invoke("train", path)
    assert result.exit_code == 0, result.stderr
    assert "8 rows read, 8 used; not read: source, stars" in result.stdout + result.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "8 rows read, 8 used; not read: source, stars" in json.dumps(events)


@pytest.mark.parametrize(
    "row",
    [
        DOLLY,
        {"question": ASKED, "context": HELD, "answer": SAID},
        {"question": ASKED, "choices": ["In 1900.", "In 1901."], "answer": "A"},
        {"question": ASKED, "context": HELD},
    ],
)
def test_generation_uses_the_prompt_of_training(pico_folder: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    file = str(write_jsonl(tmp_path / "rows.jsonl", [row]))
    (asked,) = read_prompts(file, {}, raw=False)
    prompt = prompt_tokens(tokenizer, asked.problem)
    trained = row if "answer" in row or "response" in row else {**row, "answer": SAID}
    file = str(write_jsonl(tmp_path / "trained.jsonl", [trained]))
    examples, _ = read_supervised(read(file), {}, step_format=NAMED_FORMATS["think"])
    (encoded,), _ = encode_supervised(tokenizer, examples, step_format=NAMED_FORMATS["think"], max_length=None)
    assert encoded.ids[: len(prompt)] == prompt
    assert not any(encoded.mask[: len(prompt)])
    assert encoded.mask[len(prompt)]


def test_generation_gets_the_row_s_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    talk = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk, "tools": tools}]))
    (asked,) = read_prompts(file, {}, raw=False)
    assert [tool["function"]["name"] for tool in asked.problem.tools] == ["find"]  # type: ignore[union-attr]
    assert [message.role for message in asked.with_system("be kind").messages or ()] == ["system", "user"]
    assert asked.with_system("be kind").problem.tools == asked.problem.tools  # type: ignore[union-attr]


def test_a_role_of_no_format_is_refused(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", [DOLLY]))
    with pytest.raises(DataError, match="did you mean context"):
        read_supervised(read(file), {"contxt": None}, step_format=NAMED_FORMATS["think"])


def test_preview_shows_tools_and_calls(pico_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    from tests.data.chat_templates import HERMES

    # With the pico tokenizer's own end, so that the row is short.
    short = HERMES.replace("<|im_start|>", "#").replace("<|im_end|>", "<eos>")
    (tmp_path / "tools.jinja").write_text(short, encoding="utf-8")
    call = {"name": "find", "arguments": {"a": 1}}
    row = {
        "messages": [{"role": "user", "content": "where"}, {"role": "tool_call", "content": json.dumps(call)},
                     {"role": "tool_response", "content": "Ulm"}, {"role": "assistant", "content": "Ulm"}],
        "tools": json.dumps([{"name": "find", "parameters": {}}]),
    }  # fmt: skip
    template = {"chat_template": str(tmp_path / "tools.jinja")}
    path = config(tmp_path, pico_folder, "sft", "training_data", [row] * 12, **template)
    result = invoke("data", "preview", path, "--rows", 1)
    assert result.exit_code == 0, result.stderr
    text = shown(result.stdout)
    assert '[<tool_call>\n{"name": "find", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\nUlm\n</tool_response>" in text
    assert "learned · tools: find · calls: find" in result.stdout
    plain = invoke("data", "preview", path, "--rows", 1, "data.chat_template=plain")
    assert plain.exit_code == 2
    assert "the chat template does not write the row's tools (plain (### User: ... ### Assistant: ...))" in plain.stderr
