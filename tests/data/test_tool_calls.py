"""Parsers of tool calls: whole turns, the same turns in any pieces, and what is no call."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.config.diagnostics import UserError
from loopos.config.variants import TOOL_PARSERS
from loopos.data.tool_calls import Scan, ToolCall, ToolReader, parse_turn

ADD = ToolCall("add", {"a": 1, "b": [2, {"c": "}"}]})
CALL = json.dumps({"name": "add", "arguments": ADD.arguments})
FIND = ToolCall("find", {"text": 'a "b" </tool_call> [TOOL_CALLS] c'})
FOUND = json.dumps({"name": "find", "arguments": FIND.arguments})
LLAMA = json.dumps({"name": "add", "parameters": ADD.arguments})


def scan_of(name: str) -> Scan:
    return TOOL_PARSERS[name].load()  # type: ignore[no-any-return]


# Parser, text → content, calls.
TURNS = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [ADD]),
    ("hermes", f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{FOUND}</tool_call>\n", "Let me see.", [ADD, FIND]),
    ("hermes", f"<think>\nx\n</think>\n\n<tool_call>\n{CALL}\n</tool_call> so", "<think>\nx\n</think>so", [ADD]),
    ("hermes", "no call, 1 < 2 \n", "no call, 1 < 2 \n", []),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ToolCall("now", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "x\ny"}}', "", [ToolCall("now", {"a": "x\ny"})]),
    ("llama3", LLAMA, "", [ADD]),
    ("llama3", f"\n<|python_tag|>{LLAMA}", "", [ADD]),
    ("llama3", f"{LLAMA}; {CALL}", "", [ADD, ADD]),
    ("llama3", '{"type": "function", "name": "add", "parameters": {}}', "", [ToolCall("add", {})]),
    ("llama3", '{"total": 4}', '{"total": 4}', []),
    ("llama3", '{"name": "Ada", "age": 4}', '{"name": "Ada", "age": 4}', []),
    ("llama3", f"It is {LLAMA}", f"It is {LLAMA}", []),
    ("mistral", f"[TOOL_CALLS][{CALL}, {FOUND}]", "", [ADD, FIND]),
    ("mistral", f"[TOOL_CALLS] [{CALL}]", "", [ADD]),
    ("mistral", f"Well. [TOOL_CALLS]add{json.dumps(ADD.arguments)}[TOOL_CALLS]find{json.dumps(FIND.arguments)}", "Well.", [ADD, FIND]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{json.dumps(ADD.arguments)}", "", [ADD]),
    ("mistral", "a [TOOL", "a [TOOL", []),
    ("json", CALL, "", [ADD]),
    ("json", f" [{CALL}, {FOUND}] ", "", [ADD, FIND]),
    ("json", f"```json\n{CALL}\n```", "", [ADD]),
    ("json", f"Here: {CALL}", f"Here: {CALL}", []),
    ("json", "```python\nx\n```", "```python\nx\n```", []),
    ("json", '[1, 2]', "[1, 2]", []),
]  # fmt: skip
MALFORMED = [
    ("hermes", '<tool_call>{"name": "add", "arguments": {</tool_call> x', '<tool_call>{"name": "add", "arguments": {</tool_call> x', "not one JSON object"),
    ("hermes", 'a <tool_call>{"name": "add"', 'a <tool_call>{"name": "add"', "not complete"),
    ("hermes", "<tool_call>add(1)</tool_call>", "<tool_call>add(1)</tool_call>", "not one JSON object"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
    ("hermes", "<tool_call>{'name': 'add'}</tool_call>", "<tool_call>{'name': 'add'}</tool_call>", "cannot be read"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, '"arguments" is not an object'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, "NaN is not JSON"),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", "not a JSON object"),
    ("llama3", '{"name": "add", "parameters": {"a": 1', None, "not complete"),
    ("llama3", '{"name": "add", "parameters": 3}', None, "not an object"),
    ("mistral", "[TOOL_CALLS] add it", None, "not complete"),
    ("mistral", "[TOOL_CALLS][]", None, "an empty list"),
    ("json", '{"name": "add", "arguments": {', None, "not complete"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), TURNS)
def test_turns_are_read(name: str, text: str, content: str, calls: list[ToolCall]) -> None:
    found = parse_turn(scan_of(name), text)
    assert found.calls == calls
    assert found.content.strip() == content.strip()
    assert calls or found.content == content, "text without calls is unchanged"
    assert not found.malformed


@pytest.mark.parametrize(("name", "text", "content", "piece"), MALFORMED)
def test_malformed_calls_are_content_and_counted(name: str, text: str, content: str | None, piece: str) -> None:
    found = parse_turn(scan_of(name), text)
    assert not found.calls
    assert found.content.split() == (content or text).split()
    assert len(found.malformed) == 1
    assert piece in found.malformed[0]


@pytest.mark.parametrize(("name", "text"), [case[:2] for case in (*TURNS, *MALFORMED)])
def test_streams_equal_whole_turns(name: str, text: str) -> None:
    whole, grown = parse_turn(scan_of(name), text), ToolReader(scan_of(name))
    pieces = [grown.read(text[:length], ended=length == len(text)) for length in range(1, len(text) + 1)]
    assert ("".join(content for content, _ in pieces), [call for _, calls in pieces for call in calls]) == (
        grown.content,
        grown.calls,
    )
    assert (grown.content, grown.calls, grown.malformed) == (whole.content, whole.calls, whole.malformed)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", CALL, LLAMA, "{", "}", '"', " ", "\n", ";", "a", "[", "]", "```json\n", "```"]), max_size=8), st.sampled_from(list(TOOL_PARSERS)), st.integers(1, 7))  # fmt: skip
def test_any_text_in_any_pieces(parts: list[str], name: str, step: int) -> None:
    text = "".join(parts)
    whole, grown = parse_turn(scan_of(name), text), ToolReader(scan_of(name))
    for length in range(step, len(text), step):
        grown.read(text[:length], ended=False)
    grown.read(text, ended=True)
    assert (grown.content, grown.calls, grown.malformed) == (whole.content, whole.calls, whole.malformed)


def test_a_stream_sends_content_as_soon_as_it_is_sure() -> None:
    reader = ToolReader(scan_of("hermes"))
    assert reader.read("one two", ended=False) == ("one two", [])
    assert reader.read("one two <tool_", ended=False) == ("", [])
    assert reader.read("one two <tool_box>", ended=False) == (" <tool_box>", [])


def test_an_unknown_parser_is_named() -> None:
    with pytest.raises(UserError, match=r'got the parser of tool calls "hermse".*did you mean "hermes"'):
        TOOL_PARSERS["hermse"]
