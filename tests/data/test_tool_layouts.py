"""Conversations with tools in the layouts of other tools, a row each: one text, of which the assistant's turns are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import HERMES, LLAMA_TOOLS, MISTRAL_TOOLS, TOOL_TOKENS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised

THINK = NAMED_FORMATS["think"]
FIND: dict[str, Any] = {"name": "find", "description": "Finds a parcel.", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}}  # fmt: skip
TOOL = {"type": "function", "function": FIND}
ARGUMENTS = {"id": "A0"}
CALL = {"name": "find", "arguments": ARGUMENTS}
WHERE, FOUND, SAID = "where is A0?", '{"place": "Ulm"}', "It is in Ulm."


def with_call(call: object, **more: object) -> list[dict[str, object]]:
    return [
        {"role": "user", "content": WHERE}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": FOUND, **more}, {"role": "assistant", "content": SAID},
    ]  # fmt: skip


def sharegpt(caller: str, tool: str, call: object) -> list[dict[str, object]]:
    turns = (("human", WHERE), (caller, call), (tool, FOUND), ("gpt", SAID))
    return [{"from": speaker, "value": value} for speaker, value in turns]


LAYOUTS: dict[str, dict[str, Any]] = {
    "TRL": {"messages": with_call({"type": "function", "function": CALL}, name="find"), "tools": [TOOL]},
    "TRL, tools as text": {"messages": with_call({"type": "function", "function": CALL}), "tools": json.dumps([TOOL])},
    "TRL, prompt and completion": {
        "prompt": with_call({"function": CALL})[:1], "completion": with_call({"function": CALL})[1:], "tools": [TOOL]},
    "OpenAI's fine-tuning": {
        "messages": with_call({"id": "call_1", "type": "function", "function": {**CALL, "arguments": json.dumps(ARGUMENTS)}}, tool_call_id="call_1"),
        "tools": [TOOL], "parallel_tool_calls": False},
    "OpenAI's older functions": {
        "messages": [
            {"role": "user", "content": WHERE},
            {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": json.dumps(ARGUMENTS)}},
            {"role": "function", "name": "find", "content": FOUND}, {"role": "assistant", "content": SAID}],
        "functions": [FIND]},
    "Axolotl": {"messages": with_call({"type": "function", "function": CALL}, name="find"), "tools": [TOOL]},
    "ms-swift": {
        "tools": json.dumps([TOOL]),
        "messages": [
            {"role": "user", "content": WHERE}, {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": FOUND}, {"role": "assistant", "content": SAID}]},
    "LLaMA-Factory, sharegpt": {
        "conversations": sharegpt("function_call", "observation", json.dumps(CALL)), "tools": json.dumps([FIND])},
    "LLaMA-Factory, a list of calls": {
        "conversations": sharegpt("function_call", "observation", json.dumps([CALL])), "tools": json.dumps([FIND])},
    "ShareGPT, an object": {"conversations": sharegpt("function_call", "function_response", CALL), "tools": [FIND]},
    "LLaMA-Factory, openai": {
        "messages": [
            {"role": "user", "content": WHERE}, {"role": "function_call", "content": json.dumps(CALL)},
            {"role": "tool", "content": FOUND}, {"role": "assistant", "content": SAID}],
        "tools": json.dumps([FIND])},
}  # fmt: skip
CALLED = '<tool_call>\n{"name": "find", "arguments": {"id": "A0"}}\n</tool_call><|im_end|>'
WHOLE = (
    f"<|im_start|>system\n<tools>\n{json.dumps(TOOL)}\n</tools><|im_end|>\n<|im_start|>user\n{WHERE}<|im_end|>\n"
    f"<|im_start|>assistant\n{CALLED}\n<|im_start|>user\n<tool_response>\n{FOUND}\n</tool_response><|im_end|>\n"
    f"<|im_start|>assistant\n{SAID}<|im_end|>"
)


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(TOOL_TOKENS, special_tokens=True)
    return opened  # type: ignore[no-any-return]


def learned(tokenizer: PreTrainedTokenizerBase, folder: Path, row: dict[str, Any], source: str) -> tuple[str, str]:
    """The whole text of a row and, of it, what is learned."""
    tokenizer.chat_template = source
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    examples, _ = read_supervised(read(str(file)), {}, step_format=THINK)
    (encoded,), _ = encode_supervised(tokenizer, examples, step_format=THINK, max_length=None)
    summary = [token for token, kept in zip(encoded.ids, encoded.mask, strict=True) if kept]
    return tokenizer.decode(encoded.ids), tokenizer.decode(summary)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_conversation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, layout: str) -> None:
    assert learned(tokenizer, tmp_path, LAYOUTS[layout], HERMES) == (WHOLE, f"{CALLED}{SAID}<|im_end|>")


@pytest.mark.parametrize("layout", ["ms-swift", "LLaMA-Factory, sharegpt"])
@pytest.mark.parametrize(
    ("source", "call"),
    [(LLAMA_TOOLS, '{"name": "find", "parameters": {"id": "A0"}}<|eot_id|>'),
     (MISTRAL_TOOLS, '[TOOL_CALLS][{"name": "find", "arguments": {"id": "A0"}, "id": "call00000"}]<eos>')],
)  # fmt: skip
def test_layouts_without_ids_under_other_templates(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, layout: str, source: str, call: str
) -> None:
    whole, summary = learned(tokenizer, tmp_path, LAYOUTS[layout], source)
    assert summary.startswith(call)
    assert '"call_id": "call00000"' in whole or source is LLAMA_TOOLS


def test_several_calls_of_a_turn_are_one_message(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = {"name": "find", "arguments": {"id": "A1"}}
    turns = [
        {"role": "user", "content": WHERE}, {"role": "assistant", "content": "Let me see."},
        {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_call", "content": json.dumps(other)},
        {"role": "tool_response", "content": "Ulm"}, {"role": "tool_response", "content": "Bonn"},
        {"role": "assistant", "content": SAID},
    ]  # fmt: skip
    whole, summary = learned(tokenizer, tmp_path, {"messages": turns, "tools": [TOOL]}, HERMES)
    second = CALLED.replace("A0", "A1")
    assert summary == f"Let me see.\n{CALLED.removesuffix('<|im_end|>')}\n{second}{SAID}<|im_end|>"
    assert "<tool_response>\nUlm\n</tool_response>\n<tool_response>\nBonn\n</tool_response>" in whole
    del turns[1]
    whole, _ = learned(tokenizer, tmp_path, {"messages": turns, "tools": [TOOL]}, MISTRAL_TOOLS)
    assert '{"content": "Bonn", "call_id": "call00001"}' in whole


@pytest.mark.parametrize(
    ("row", "place", "piece"),
    [
        ({"messages": [{"role": "user", "content": WHERE}, {"role": "tool_call", "content": "find A0"}]},
         "messages[1].content: got 'find A0' (text)", 'expected a call such as {"name": ..., "arguments": {...}}'),
        ({"conversations": sharegpt("function_call", "observation", '{"arguments": {}}')}, "conversations[1].value", "a call such as"),
        ({"conversations": sharegpt("function_call", "observation", json.dumps({**CALL, "arguments": "A0"}))},
         "conversations[1].value.arguments: got 'A0' (text)", "an object, also as JSON text"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], place: str, piece: str
) -> None:
    with pytest.raises(DataError) as caught:
        learned(tokenizer, tmp_path, row, HERMES)
    message = str(caught.value.diagnostics[0])
    assert message.startswith(f"{tmp_path}/rows.jsonl:1: {place}")
    assert piece in message
