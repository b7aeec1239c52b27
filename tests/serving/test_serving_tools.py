"""Tools and JSON schemas over HTTP: calls in answers and streams, results in prompts, answers that follow a schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loopos.config.variants import TOOL_PARSERS
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.templates import ChatTemplate
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.completions import Completion, TokenDelta
from loopos.serving.language import LanguageService
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.serving.responses import ResponseFormatter
from tests.data.chat_templates import HERMES
from tests.serving.conftest import Server, served

SHORT = HERMES.replace("<|im_start|>", "#").replace("<|im_end|>", "<eos>")
COUNT: Any = {
    "type": "function",
    "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object"}},
}
ASKED: Any = [{"role": "user", "content": "how long?"}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "number": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["color", "number"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tool_server(pico_folder: Path) -> Iterator[Server]:
    """A random model with many positions whose every turn is read as a call of `count`."""
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    tokenizer.chat_template = SHORT
    config = AutoConfig.from_pretrained(pico_folder)
    config.max_position_embeddings = 4096
    model = AutoModelForCausalLM.from_config(config).eval()
    own = Reasoner(model, tokenizer, template=ChatTemplate(tokenizer), step_format=NAMED_FORMATS["think"], max_rows=4)
    limits, metrics = ServingLimits(max_rows=4), ServingMetrics()
    service = LanguageService(own, "pico", limits, metrics, tool_parser="tests.rl.own_environments:any_text")
    with served(service, limits, metrics) as made:
        yield made


def test_calls_and_their_results(tool_server: Server) -> None:
    client = tool_server.client()
    options: Any = {"model": "pico", "max_tokens": 6, "seed": 1}
    bare = client.chat.completions.create(messages=ASKED, **options)
    assert bare.choices[0].message.tool_calls is None
    answer = client.chat.completions.create(messages=ASKED, tools=[COUNT], **options)
    message = answer.choices[0].message
    assert message.content is None
    assert answer.choices[0].finish_reason == "length"
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "count"
    assert len(call.id) == 9
    none = client.chat.completions.create(messages=ASKED, tools=[COUNT], tool_choice="none", **options)
    assert none.choices[0].message.content == bare.choices[0].message.content
    history = [*ASKED, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "9"}]
    longer = client.chat.completions.create(messages=history, tools=[COUNT], **options)  # type: ignore[arg-type]
    assert longer.usage is not None
    assert answer.usage is not None
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens
    stream = list(client.chat.completions.create(messages=ASKED, tools=[COUNT], stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert not any(delta.content for delta in deltas)
    (streamed,) = [each for delta in deltas for each in delta.tool_calls or []]
    assert streamed.index == 0
    assert streamed.function is not None
    assert (streamed.function.name, streamed.function.arguments) == ("count", call.function.arguments)


def test_tools_that_the_template_does_not_write_are_refused(language: Callable[..., Any]) -> None:
    with language() as server, pytest.raises(BadRequestError, match="it does not write tools") as caught:
        server.client().chat.completions.create(model="pico", messages=ASKED, tools=[COUNT], max_tokens=3)
    assert caught.value.param == "tools"


TURN = 'Well.\n<tool_call>\n{"name": "f", "arguments": {"é": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names", "reason", "malformed"),
    [
        (TURN, "Well.", ["f", "g"], "tool_calls", 0),
        ("Well.", "Well.", [], "stop", 0),
        ("<tool_call>{}</tool_call> so", "<tool_call>{}</tool_call> so", [], "stop", 1),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_answers_with_calls_whole_and_streamed(
    text: str, content: str, names: list[str], reason: str, malformed: int, size: int, pico_tokenizer: Path
) -> None:
    counted: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    form = ResponseFormatter("chat", "m", 1, False, False, tokenizer, TOOL_PARSERS["hermes"].load(), counted.append)
    (choice,) = form.whole([Completion(0, 0, [5], text, [0.0], None, (), "stop")], 1)["choices"]
    calls = choice["message"].get("tool_calls", [])
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, reason)
    assert [call["function"]["name"] for call in calls] == names
    assert not calls or json.loads(calls[0]["function"]["arguments"]) == {"é": 1}
    grown, chunks = form.growing(), list[Any]()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for number, piece in enumerate(pieces):
        chunks += form.chunks(TokenDelta(0, 0, 5, piece, 0.0, "stop" if number == len(pieces) - 1 else None), grown)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == content
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in streamed] == list(enumerate(names))
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert counted == [malformed, malformed]


def test_answers_follow_a_schema_beside_others(tool_server: Server) -> None:
    pytest.importorskip("llguidance")
    from concurrent.futures import ThreadPoolExecutor

    client = tool_server.client()
    form: Any = {"type": "json_schema", "json_schema": {"name": "choice", "schema": SCHEMA, "strict": True}}
    other: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}
    alone = (
        client.chat.completions.create(model="pico", messages=ASKED, max_tokens=8, seed=2).choices[0].message.content
    )

    def answered(number: int) -> str:
        chosen: Any = (form, other, None)[number % 3]
        more = {} if chosen is None else {"response_format": chosen}
        made = client.chat.completions.create(
            model="pico", messages=ASKED, max_tokens=60 if chosen else 8, seed=2 if chosen is None else number, **more
        )
        assert chosen is None or made.choices[0].finish_reason == "stop"
        return made.choices[0].message.content or ""

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(answered, range(12)))
    for number, text in enumerate(texts):
        if number % 3 == 0:
            value = json.loads(text)
            assert set(value) == {"color", "number"}
            assert value["color"] in ("red", "blue")
            assert 1 <= value["number"] <= 9
        elif number % 3 == 1:
            assert text in ("true", "false")
        else:
            assert text == alone, "rows without a grammar are what they were"
    assert len({texts[number] for number in (0, 3, 6, 9)}) > 1
    stream = client.chat.completions.create(
        model="pico", messages=ASKED, max_tokens=60, seed=0, response_format=form, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == texts[0]
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    with pytest.raises(BadRequestError, match="the JSON schema cannot be followed: Invalid type: strin"):
        client.chat.completions.create(model="pico", messages=ASKED, max_tokens=3, response_format=wrong)
    with pytest.raises(BadRequestError, match="with tools an answer may be a call"):
        client.chat.completions.create(model="pico", messages=ASKED, tools=[COUNT], response_format=form)
