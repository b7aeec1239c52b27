"""The server and the official client: texts, streams, usage and embeddings equal the engine's own."""

from __future__ import annotations

import base64
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import torch
from questions import ASKED, NEVER_ENDS, Chat

from loopos.data.conversations import Message
from loopos.data.rows import Row
from loopos.data.supervised_rows import Completion as RawText
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.completions import Completion
from loopos.generation.settings import SamplingParams
from tests.serving.conftest import Server

NEW = 12
WORDS = "where is the parcel"


def expected(reasoner: Reasoner, prompt: Any, *, n: int = 1, **settings: Any) -> list[Completion]:
    """The engine's own text for a chat (messages), a text or tokens."""
    ids = prompt if isinstance(prompt, list) and isinstance(prompt[0], int) else reasoner.prompt(prompt)
    chosen = SamplingParams(**{"temperature": 1.0, "max_new_tokens": NEW, **settings})
    return reasoner.engine.generate([ids], reasoner.sampling(chosen), n=n)


def asked(words: str = WORDS) -> list[Message]:
    return [Message("user", words)]


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").owned_by == "loopos"
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("gpt")
    assert told.value.code == "model_not_found"


def test_a_chat_is_the_engines(server: Server, reasoner: Reasoner) -> None:
    answer = server.client().chat.completions.create(model="pico", messages=ASKED, seed=5, max_tokens=NEW)
    (own,) = expected(reasoner, asked(), seed=5)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (own.text, "assistant")
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    length = len(reasoner.prompt(asked()))
    assert counts == (length, NEW, length + NEW)


def test_several_choices_logprobs_and_a_system_message(server: Server, reasoner: Reasoner) -> None:
    messages: Any = [
        {"role": "system", "content": "be kind", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "where is "}, {"type": "text", "text": "the parcel"}]},
    ]
    answer = server.client().chat.completions.create(
        model="pico", messages=messages, seed=3, max_completion_tokens=NEW, n=2, logprobs=True, top_p=0.9,
        extra_body={"top_k": 50, "repetition_penalty": 1.1},
    )  # fmt: skip
    own = expected(
        reasoner, [Message("system", "be kind"), *asked()], n=2, seed=3, top_p=0.9, top_k=50, repetition_penalty=1.1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [each.text for each in own]
    assert own[0].text != own[1].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(each.token_ids) for each in own)
    for choice, each in zip(answer.choices, own, strict=True):
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert [entry.logprob for entry in content] == pytest.approx(each.logprobs, abs=1e-4)
        assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)


def test_a_stream_makes_up_the_answer(server: Server, reasoner: Reasoner) -> None:
    stream = server.client().chat.completions.create(
        model="pico", messages=ASKED, seed=5, n=2, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    own = expected(reasoner, asked(), n=2, seed=5, max_new_tokens=60)
    assert len({chunk.id for chunk in chunks}) == 1
    texts, roles, ends = ["", ""], ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert ends[choice.index] == ""
        if choice.delta.role:
            assert texts[choice.index] == ""
            roles[choice.index] += choice.delta.role
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ""
    assert roles == ["assistant", "assistant"]
    assert texts == [each.text for each in own]
    assert ends == ["length" if each.finish_reason == "length" else "stop" for each in own]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == sum(len(each.token_ids) for each in own)


def test_the_bytes_of_a_stream_are_whole_characters_and_end_with_done(server: Server, reasoner: Reasoner) -> None:
    """The pico model generates random bytes, and therefore incomplete characters too."""
    body = {"model": "pico", "prompt": WORDS, "seed": 8, "max_tokens": 120, "stream": True, "logprobs": 0}
    question = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(question, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = answer.read().decode("utf-8").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    (own,) = expected(reasoner, RawText(WORDS, "", Row({}, "t", None, 0)), seed=8, max_new_tokens=120)
    assert "".join(chunk["text"] for chunk in chunks) == own.text
    told = [chunk["logprobs"]["token_logprobs"][0] for chunk in chunks if chunk["logprobs"]]
    assert told == pytest.approx(own.logprobs[: len(told)], abs=1e-4)
    offsets = [chunk["logprobs"]["text_offset"][0] for chunk in chunks if chunk["logprobs"]]
    assert offsets == sorted(offsets)


def test_completions_of_texts_and_of_tokens(server: Server, reasoner: Reasoner) -> None:
    client = server.client()
    texts = [WORDS, "my card", WORDS]
    answer = client.completions.create(model="pico", prompt=texts, seed=4, n=2, max_tokens=NEW, logprobs=0)
    ids = [reasoner.prompt(RawText(text, "", Row({}, "t", None, 0))) for text in texts]
    sampling = reasoner.sampling(SamplingParams(temperature=1.0, max_new_tokens=NEW, seed=4))
    own = reasoner.engine.generate(ids, sampling, n=2)
    assert [choice.text for choice in answer.choices] == [each.text for each in own]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    first = answer.choices[0].logprobs
    assert first is not None
    assert first.token_logprobs == pytest.approx(own[0].logprobs, abs=1e-4)
    assert (
        client.completions.create(model="pico", prompt=ids[:2], seed=4, n=2, max_tokens=NEW).choices[3].text
        == own[3].text
    )
    short = client.completions.create(model="pico", prompt=ids[1], seed=4)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 16
    assert short.choices[0].text == expected(reasoner, ids[1], seed=4, max_new_tokens=16)[0].text


def test_stop_strings_and_biases(server: Server, reasoner: Reasoner) -> None:
    client = server.client()
    (own,) = expected(reasoner, asked(), seed=5, max_new_tokens=60)
    stop = own.text[10:12]
    cut = client.chat.completions.create(model="pico", messages=ASKED, seed=5, max_tokens=60, stop=["zzzz", stop])
    assert cut.choices[0].message.content == own.text[: own.text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(
        model="pico", messages=ASKED, seed=5, max_tokens=60, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == cut.choices[0].message.content
    forced = client.completions.create(model="pico", prompt=WORDS, logit_bias={"70": 100}, max_tokens=3, temperature=0)
    token = reasoner.tokenizer.decode([70])
    assert forced.choices[0].text == token * 3
    again = client.completions.create(
        model="pico", prompt=WORDS, logit_bias={"70": 10}, max_tokens=40, temperature=0, presence_penalty=2,
        frequency_penalty=2,
    )  # fmt: skip
    own_again = expected(
        reasoner, RawText(WORDS, "", Row({}, "t", None, 0)), temperature=0.0, logit_bias={70: 10.0},
        presence_penalty=2.0, frequency_penalty=2.0, max_new_tokens=40,
    )  # fmt: skip
    assert again.choices[0].text == own_again[0].text


def test_without_a_seed_texts_differ(server: Server) -> None:
    client = server.client()
    texts = {client.completions.create(model="pico", prompt=WORDS).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_embeddings_are_mean_hidden_states(server: Server, reasoner: Reasoner) -> None:
    client = server.client()
    texts = ["a kind answer", WORDS * 3]
    found = client.embeddings.create(model="pico", input=texts)
    as_floats = client.embeddings.create(model="pico", input=texts, encoding_format="float")
    ids = [reasoner.prompt(RawText(text, "", Row({}, "t", None, 0))) for text in texts]
    with torch.no_grad():
        alone = [reasoner.model.model(input_ids=torch.tensor([each])).last_hidden_state[0].mean(0) for each in ids]
    for answer in (found, as_floats):
        assert [each.index for each in answer.data] == [0, 1]
        for each, expected in zip(answer.data, alone, strict=True):
            np.testing.assert_allclose(each.embedding, expected.numpy(), atol=1e-5)
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    raw = client.embeddings.with_raw_response.create(model="pico", input=ids[0], encoding_format="base64")
    told = json.loads(raw.content)["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(told), "<f4"), alone[0].numpy(), atol=1e-5)


def test_many_clients_get_each_their_own_text(server: Server, reasoner: Reasoner) -> None:
    """24 requests from 12 threads over four rows, streamed or not: every text equals that of a single request."""

    def ask(index: int) -> tuple[str, int]:
        chat: Chat = {"model": "pico", "messages": [{"role": "user", "content": f"order {index % 7}"}]}
        limits: Any = {"seed": index, "max_tokens": 4 + index % 20, "temperature": 0.5 + index % 3 / 4}
        with server.fresh() as client:
            if index % 2:
                stream = client.chat.completions.create(**chat, **limits, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream), index
            return client.chat.completions.create(**chat, **limits).choices[0].message.content or "", index

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    for text, place in answers:
        limits = {"seed": place, "max_new_tokens": 4 + place % 20, "temperature": 0.5 + place % 3 / 4}
        assert text == expected(reasoner, asked(f"order {place % 7}"), **limits)[0].text
    assert server.metric("loopos_active_rows") == 0
    assert server.metric("loopos_queue_length") == 0


def test_metrics_count(server: Server) -> None:
    lines = {
        name: server.metric(name)
        for name in (
            'loopos_requests_total{endpoint="/v1/embeddings",status="200"}',
            'loopos_request_seconds_count{endpoint="/v1/embeddings"}',
            'loopos_request_seconds_bucket{endpoint="/v1/embeddings",le="+Inf"}',
            "loopos_prompt_tokens_total",
            "loopos_generated_tokens_total",
        )
    }
    before = list(lines.values())
    server.client().embeddings.create(model="pico", input=[[5, 6, 7]])
    server.client().completions.create(model="pico", prompt=[5, 6], max_tokens=4, logit_bias=NEVER_ENDS)
    after = [server.metric(name) for name in lines]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 5, 4]
    assert server.metric("process_resident_memory_bytes") > 1e7
