"""Tools, calls of them and parts of messages: they reach the template as it takes them, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, ITEMS_CHATML, NO_END, SPECIAL, TOOL_CHATML
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError
from loopos.data.preference_tokens import encode_comparisons, encode_prompts
from loopos.data.preferences import read_comparisons
from loopos.data.prompts import read_prompts
from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.data.supervised_tokens import encode_supervised, prompt_tokens
from loopos.data.templates import ChatTemplate

THINK = NAMED_FORMATS["think"]
FIND: dict[str, Any] = {"name": "find", "description": "Finds a parcel.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FIND}
WRITTEN = (
    '{"type": "function", "function": {"name": "find", "description": "Finds a parcel.", '
    '"parameters": {"type": "object"}}}'
)
ASKED = {"role": "user", "content": "where"}
FOUND = {"role": "assistant", "content": "here"}


def call(arguments: object, **more: object) -> dict[str, object]:
    function = {"name": "find", "arguments": arguments}
    calls = [{"id": "c1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(SPECIAL, special_tokens=True)
    opened.chat_template = TOOL_CHATML
    return opened


def file_of(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learned(tokenizer: PreTrainedTokenizerBase, folder: Path, row: dict[str, Any], source: str) -> tuple[str, str]:
    """The whole text of a row and, of it, what is learned."""
    tokenizer.chat_template = source
    examples, _ = read_supervised(read(file_of(folder, row)), {}, step_format=THINK)
    (encoded,), _ = encode_supervised(tokenizer, examples, step_format=THINK, max_length=None)
    prompt = prompt_tokens(tokenizer, examples[0])
    assert encoded.ids[: len(prompt)] == prompt, "a prompt's ids are those of training"
    summary = [token for token, kept in zip(encoded.ids, encoded.mask, strict=True) if kept]
    return tokenizer.decode(encoded.ids), tokenizer.decode(summary)


def diagnostic_of(
    tokenizer: PreTrainedTokenizerBase, folder: Path, row: dict[str, Any], source: str = TOOL_CHATML
) -> str:
    with pytest.raises(DataError) as caught:
        learned(tokenizer, folder, row, source)
    return str(caught.value.diagnostics[0])


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": repr([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tool_defs": [FIND]},
        {"functions": [FIND]},
        {"tools": [{"function": {**FIND, "parameters": json.dumps(FIND["parameters"])}, "type": "function"}]},
        {"tools": [{"function": {**FIND, "strict": None}, "type": "function"}]},
    ],
)
def test_tools_reach_the_template_in_one_form(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, columns: dict[str, Any]
) -> None:
    whole, summary = learned(tokenizer, tmp_path, {"messages": [ASKED, FOUND], **columns}, TOOL_CHATML)
    head = f"<|im_start|>system\n{WRITTEN}\n<|im_end|>\n"
    assert whole == f"{head}<|im_start|>user\nwhere<|im_end|>\n<|im_start|>assistant\nhere<|im_end|>"
    assert summary == "here<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "where", "output": "here", "tools": [TOOL]},
        {"prompt": [ASKED], "completion": [FOUND], "tools": [TOOL]},
    ],
)
def test_tools_of_other_formats(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any]) -> None:
    assert WRITTEN in learned(tokenizer, tmp_path, row, TOOL_CHATML)[0]


def test_tools_of_preferences_and_prompts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = TOOL_CHATML
    file = file_of(tmp_path, {"prompt": "where", "chosen": "here", "rejected": "there", "tools": [TOOL]})
    pairs, _ = read_comparisons(read(file), {})
    (pair,), _ = encode_comparisons(tokenizer, pairs, template=None, max_length=None)
    prompts, _ = read_prompts(read(file), {})
    (prompt,), _ = encode_prompts(tokenizer, prompts, template=None, max_length=None)
    assert tokenizer.decode(pair.prompt).startswith(f"<|im_start|>system\n{WRITTEN}\n<|im_end|>\n")
    assert prompt == pair.prompt
    bare, _ = read_prompts(read(file_of(tmp_path, {"prompt": "where"}, {"prompt": "where", "tools": [TOOL]})), {})
    assert [len(each.tools) for each in bare] == [0, 1], "the same words with other tools are another prompt"


@pytest.mark.parametrize(
    ("row", "source", "piece"),
    [
        ({"messages": [ASKED, FOUND], "tools": [TOOL]}, CHATML, "the chat template does not write the row's tools"),
        ({"messages": [ASKED, call({"id": "A0"})]}, CHATML.replace("message['content']", "(message['content'] or '')"),
         "leaves out a call of the tool 'find'"),
        ({"messages": [ASKED, call({}), {"role": "tool", "content": "in Ulm"}, FOUND]},
         TOOL_CHATML.replace("{% for message in messages %}",
                             "{% for message in messages if message.role != 'tool' %}"),
         "leaves out a message of the role tool: 'in Ulm'"),
        ({"messages": [{"role": "developer", "content": "be kind"}, ASKED, FOUND]},
         CHATML.replace("messages %}", "messages if message['role'] != 'developer' %}", 1),
         "leaves out a message of the role developer: 'be kind'"),
        ({"messages": [ASKED, {**FOUND, "reasoning_content": "so it is"}]}, CHATML,
         "drops the assistant's reasoning_content: 'so it is'"),
    ],
)  # fmt: skip
def test_what_a_template_would_drop_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], source: str, piece: str
) -> None:
    diagnostic = diagnostic_of(tokenizer, tmp_path, row, source)
    assert diagnostic.startswith(f"{tmp_path}/rows.jsonl:1: messages: got ")
    assert piece in diagnostic


def test_reasoning_is_checked_in_what_is_learned_only(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    earlier = {**FOUND, "reasoning_content": "so it is", "weight": 0}
    _, summary = learned(tokenizer, tmp_path, {"messages": [ASKED, earlier, ASKED, FOUND]}, CHATML)
    assert summary == "here<|im_end|>"


@pytest.mark.parametrize("source", [TOOL_CHATML, ITEMS_CHATML])
@pytest.mark.parametrize("role", ["tool_calls", "function_call"])
@pytest.mark.parametrize("arguments", ['{"id": "A0"}', "{'id': 'A0'}", {"id": "A0", "note": None}])
def test_arguments_as_text_are_learned_as_objects(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, arguments: object, role: str, source: str
) -> None:
    message = call(arguments)
    if role == "function_call":
        message = {"role": "assistant", "content": None, role: {"name": "find", "arguments": arguments}}
    answered = {"role": "tool", "tool_call_id": "c1", "content": '{"place": "Ulm"}'}
    rows = {"messages": [ASKED, message, answered, FOUND]}
    whole, summary = learned(tokenizer, tmp_path, rows, source)
    expected = '{"id": "A0"}' if source == TOOL_CHATML else "id=A0"
    assert summary == f'<call>{{"name": "find", "arguments": {expected}}}</call><|im_end|>here<|im_end|>'
    assert '<|im_start|>tool\n{"place": "Ulm"}<|im_end|>' in whole


def test_a_null_inside_arguments_as_text_is_kept(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, summary = learned(tokenizer, tmp_path, {"messages": [ASKED, call('{"id": null}')]}, TOOL_CHATML)
    assert '"arguments": {"id": null}' in summary


def test_calls_in_preferences_are_parsed_too(tmp_path: Path) -> None:
    row = {"prompt": "where", "chosen": [call('{"id": "A0"}')], "rejected": json.dumps([call('{"id": "A1"}')])}
    # A response ends with the assistant's own words or call.
    ((one,), (other,)) = read_comparisons(read(file_of(tmp_path, row)), {})[0][0].responses
    found = [message.more["tool_calls"][0]["function"]["arguments"] for message in (one, other)]  # type: ignore[union-attr, index]
    assert found == [{"id": "A0"}, {"id": "A1"}]


def test_calls_under_a_template_without_an_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = NO_END.replace(
        "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    _, summary = learned(tokenizer, tmp_path, {"messages": [ASKED, call('{"id": 1}'), ASKED, FOUND]}, source)
    calls = '[{"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"id": 1}}}]'
    assert summary == f"{calls}<eos>here<eos>"


@pytest.mark.parametrize(
    ("row", "field", "piece"),
    [
        ({"messages": [ASKED, call("find A0")]}, "messages[1].tool_calls[0].function.arguments", "'find A0' (text)"),
        ({"messages": [ASKED, call("[1]")]}, "messages[1].tool_calls[0].function.arguments", "(a list)"),
        ({"messages": [ASKED, call("")]}, "messages[1].tool_calls[0].function.arguments", "without arguments has {}"),
        ({"messages": [ASKED, {**FOUND, "tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls[0]", "a call such as"),
        ({"messages": [ASKED, {**FOUND, "tool_calls": "find"}]}, "messages[1].tool_calls", "'find'"),
        ({"messages": [ASKED, {**FOUND, "content": None, "tool_calls": []}]}, "messages[1].content", "null"),
        ({"messages": [ASKED, FOUND], "tools": "find"}, "tools", "a list of tools, also as JSON text"),
        ({"messages": [ASKED, FOUND], "tools": [{"type": "function"}]}, "tools[0]", "a tool such as"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools", "with raw text, which no template renders"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, FOUND]},
         "messages[0].content[1]", "a part of the type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "text": "a"}]}, FOUND]},
         "messages[0].content[0]", "a part of the type 'input_audio'"),
    ],
)  # fmt: skip
def test_diagnostics_name_line_and_field(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], field: str, piece: str
) -> None:
    diagnostic = diagnostic_of(tokenizer, tmp_path, row)
    assert diagnostic.startswith(f"{tmp_path}/rows.jsonl:1: {field}: got ")
    assert piece in diagnostic


def test_parts_of_text_are_joined(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "wh", "image_url": None}, {"type": "input_text", "text": "ere"}]
    whole, _ = learned(tokenizer, tmp_path, {"messages": [{"role": "user", "content": parts}, FOUND]}, CHATML)
    assert "user\nwhere<|im_end|>" in whole


def test_a_tokenizer_with_a_template_for_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_CHATML}
    template = ChatTemplate(tokenizer)
    assert template.source == CHATML
    from loopos.data.conversations import Message

    assert WRITTEN in template.prompt([Message("user", "where")], [TOOL])[0].text
    assert WRITTEN not in template.prompt([Message("user", "where")])[0].text
