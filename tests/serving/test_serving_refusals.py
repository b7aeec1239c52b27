"""What a server does not do: every error has its status and OpenAI's form, and the server is alive afterwards."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from questions import ASKED, CHAT, GOOD, JSON, NEVER_ENDS, ask

from loopos.generation import scheduler as session_module
from loopos.generation.completions import Running
from loopos.generation.sampling import NonFiniteLogits
from loopos.generation.scheduler import Scheduler
from tests.serving.conftest import Server, until

LONG: dict[str, Any] = {"max_tokens": 200, "logit_bias": NEVER_ENDS}


def is_alive(server: Server) -> bool:
    answer = server.client().chat.completions.create(model=server.name, messages=ASKED, max_tokens=2)
    return bool(answer.choices)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, b'{"model": "pico",\n "messages": [}', 400, None, "invalid_json"),
        (CHAT, b'{"model": "pico", "temperature": NaN}', 400, None, "invalid_json"),
        (CHAT, b"\xff\xfe", 400, None, "invalid_json"),
        (CHAT, b"[" * 100_000, 400, None, "invalid_json"),
        (CHAT, b'{"model": "pico", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "invalid_json"),
        (CHAT, [1], 400, None, "invalid_json"),
        (CHAT, {"messages": ASKED}, 400, "model", "missing_required_parameter"),
        (CHAT, {**GOOD, "model": "gpt-4"}, 404, "model", "model_not_found"),
        (CHAT, {**GOOD, "tools": [{"type": "function"}]}, 400, "tools.0.function",
         "missing_required_parameter"),
        (CHAT, {**GOOD, "tools": []}, 200, None, None),
        (CHAT, {**GOOD, "user": None, "seed": None, "stop": None}, 200, None, None),
        (CHAT, {**GOOD, "user": 5}, 400, "user", "unsupported_parameter"),
        (CHAT, {**GOOD, "metadata": {"a": "b"}}, 400, "metadata", "unsupported_parameter"),
        (CHAT, {**GOOD, "store": True}, 400, "store", "unsupported_parameter"),
        (CHAT, {**GOOD, "response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_value"),
        (CHAT, {**GOOD, "logprobs": True, "top_logprobs": 2}, 400, "top_logprobs", "unsupported_parameter"),
        (CHAT, {**GOOD, "temperature": 3}, 400, "temperature", "invalid_value"),
        (CHAT, {**GOOD, "temperature": "hot"}, 400, "temperature", "invalid_value"),
        (CHAT, {**GOOD, "top_p": 0}, 400, "top_p", "invalid_value"),
        (CHAT, {**GOOD, "n": 0}, 400, "n", "invalid_value"),
        (CHAT, {**GOOD, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        (CHAT, {**GOOD, "max_tokens": 201}, 400, "max_tokens", "invalid_value"),
        (CHAT, {**GOOD, "max_completion_tokens": 999}, 400, "max_completion_tokens", "invalid_value"),
        (CHAT, {**GOOD, "stop": [""]}, 400, "stop", "invalid_value"),
        (CHAT, {**GOOD, "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        (CHAT, {**GOOD, "logit_bias": {"400": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT, {**GOOD, "logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
        (CHAT, {**GOOD, "messages": []}, 400, "messages", "invalid_value"),
        (CHAT, {**GOOD, "messages": [{"role": "user"}]}, 400, "messages.0.content", "missing_required_parameter"),
        (CHAT, {**GOOD, "messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        (CHAT, {**GOOD, "messages": [{"role": "user", "content": "x " * 300}]}, 400, "messages",
         "context_length_exceeded"),
        ("/v1/completions", {"model": "pico", "prompt": "x", "echo": True}, 400, "echo", "unsupported_parameter"),
        ("/v1/completions", {"model": "pico", "prompt": "x", "best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ("/v1/completions", {"model": "pico", "prompt": "x", "logprobs": 3}, 400, "logprobs", "unsupported_parameter"),
        ("/v1/completions", {"model": "pico", "prompt": [5, 400]}, 400, "prompt", "invalid_value"),
        ("/v1/completions", {"model": "pico", "prompt": [5] * 257}, 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", {"model": "pico", "prompt": [], "max_tokens": 1}, 400, "prompt", "invalid_value"),
        ("/v1/completions", {"model": "pico", "prompt": ["x"] * 80, "n": 2}, 400, "n", "invalid_value"),
        ("/v1/embeddings", {"model": "pico", "input": "x", "dimensions": 3}, 400, "dimensions",
         "unsupported_parameter"),
        ("/v1/embeddings", {"model": "pico", "input": [[5] * 300]}, 400, "input", "context_length_exceeded"),
        ("/v1/classify", {"model": "pico", "input": "x"}, 404, None, "wrong_kind_of_model"),
        ("/v1/score", {"model": "pico", "prompt": "x", "response": "y"}, 404, None, "wrong_kind_of_model"),
        ("/v1/nothing", {}, 404, None, "not_found"),
        (CHAT, {**GOOD, "messages": [{"role": "user", "content": "x" * 10_000_000}]}, 413, None, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_errors_have_status_and_form(
    path: str, body: object, status: int, param: str | None, code: str | None, server: Server
) -> None:
    got, told, _ = ask(server, path, body)
    assert got == status, told
    if status == 200:
        return
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert (told["error"]["param"], told["error"]["code"]) == (param, code), told
    assert told["error"]["type"] == "invalid_request_error"
    assert is_alive(server)


def test_bad_json_is_reported_with_its_position(server: Server) -> None:
    _, told, _ = ask(server, CHAT, b'{"model": "pico",\n "messages": [}')
    assert "line 2, column 15" in told["error"]["message"]


def test_methods_types_and_hosts(server: Server) -> None:
    status, told, headers = ask(server, CHAT, b"", method="GET", headers={})
    assert (status, told["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "POST")
    assert ask(server, "/v1/models", GOOD)[0] == 405
    assert ask(server, CHAT, GOOD, headers={"Content-Type": "text/plain"})[0] == 415
    assert ask(server, CHAT, GOOD, headers={**JSON, "Host": "evil.example:80"})[0] == 403
    assert ask(server, CHAT, GOOD, headers={**JSON, "Host": "localhost:1"})[0] == 200


def test_a_body_without_length_is_cut_too(server: Server) -> None:
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    connection.request("POST", CHAT, iter([b"x" * 65536] * 40), JSON, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")
    assert is_alive(server)


def test_keys(language: Callable[..., Any]) -> None:
    with language(key="sesame") as server:
        with pytest.raises(openai.AuthenticationError) as told:
            server.client("wrong").models.list()
        assert told.value.code == "invalid_api_key"
        assert ask(server, CHAT, GOOD)[0] == 401
        assert ask(server, "/v1/nothing", {})[0] == 401
        assert ask(server, "/metrics", b"", method="GET", headers={})[0] == 401
        assert ask(server, "/health", b"", method="GET", headers={})[:2] == (
            200, {"status": "live", "ready": True, "model": "pico"},
        )  # fmt: skip
        keyed = {**JSON, "Host": "models.example", "Authorization": "bearer sesame"}
        assert ask(server, CHAT, GOOD, headers=keyed)[0] == 200
        assert server.metric('loopos_requests_total{endpoint="/v1/models",status="401"}', "sesame") == 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes 10 ms at least: time to meet one in the middle."""
    step = Scheduler.step

    def slowly(session: Scheduler) -> list[Running]:
        time.sleep(0.01)
        return step(session)

    monkeypatch.setattr(Scheduler, "step", slowly)


@pytest.mark.usefixtures("slow")
def test_a_full_queue(language: Callable[..., Any]) -> None:
    with language(max_rows=1, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        ask_long = lambda: ask(server, CHAT, {**GOOD, **LONG, "max_tokens": 60})[0]  # noqa: E731
        held = [pool.submit(ask_long) for _ in range(2)]
        until(lambda: server.metric("loopos_active_rows") + server.metric("loopos_queue_length") == 2)
        status, told, headers = ask(server, CHAT, GOOD)
        assert (status, told["error"]["type"], told["error"]["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert [each.result() for each in held] == [200, 200]
        assert ask(server, CHAT, GOOD)[0] == 200


@pytest.mark.usefixtures("slow")
def test_out_of_time(language: Callable[..., Any]) -> None:
    """Before the first byte of an answer it is a status; in a stream the last event."""
    with language(max_seconds=0.5) as server:
        status, told, _ = ask(server, CHAT, {**GOOD, **LONG})
        assert (status, told["error"]["type"], told["error"]["code"]) == (408, "timeout_error", "timeout")
        stream = server.client().chat.completions.create(
            model="pico", messages=ASKED, stream=True, max_tokens=200, logit_bias=NEVER_ENDS
        )
        with pytest.raises(openai.APIError) as ended:
            list(stream)
        assert ended.value.code == "timeout"
        until(lambda: server.metric("loopos_active_rows") == 0)
        # A client that announces a body and sends none.
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port or 0), timeout=60) as silent:
            silent.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 10\r\n\r\n{"
            )
            assert silent.recv(64).startswith(b"HTTP/1.1 408")
        assert is_alive(server)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_drops_frees_its_rows(streams: bool, language: Callable[..., Any]) -> None:
    with language() as server:
        place = urlsplit(server.url)
        body = json.dumps({**GOOD, **LONG, "n": 4, "stream": streams}).encode()
        dropping = socket.create_connection((place.hostname, place.port or 0), timeout=60)
        dropping.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        if streams:
            assert dropping.recv(64).startswith(b"HTTP/1.1 200")
        until(lambda: server.metric("loopos_active_rows") == 4)
        dropping.close()
        until(lambda: server.metric("loopos_active_rows") == 0)
        # Freed before they were done.
        assert server.metric("loopos_generated_tokens_total") < 4 * 200
        until(lambda: server.metric('loopos_requests_total{endpoint="/v1/chat/completions",status="499"}') == 1)
        assert is_alive(server)


def test_a_client_that_does_not_read_is_cut_and_blocks_nobody(language: Callable[..., Any]) -> None:
    with language(max_rows=16, max_lag=8) as server:
        place = urlsplit(server.url)
        hanging = socket.socket()
        hanging.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        hanging.connect((place.hostname, place.port or 0))
        body = json.dumps({**GOOD, **LONG, "n": 12, "stream": True, "logprobs": True}).encode()
        hanging.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert is_alive(server)
        until(lambda: server.metric('loopos_cut_total{reason="slow_reader"}') == 1)
        until(lambda: server.metric("loopos_active_rows") == 0)
        assert is_alive(server)
        # What had been sent is there; then the connection ends without the stream's end.
        got = b""
        hanging.settimeout(60)
        try:
            while part := hanging.recv(65536):
                got += part
        except ConnectionResetError:
            pass
        hanging.close()
        assert got.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in got


def test_a_reset_connection(server: Server) -> None:
    place = urlsplit(server.url)
    for _ in range(3):
        broken = socket.create_connection((place.hostname, place.port or 0), timeout=60)
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        broken.close()
    assert is_alive(server)


def test_settings_without_a_token_to_choose(language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That request fails, others do not."""
    choose = session_module.choose

    def finite_but_for(logits: Any, settings: Any, **others: Any) -> Any:
        if settings.temperature == 1.5:
            raise NonFiniteLogits("the model's logits are not finite")
        return choose(logits, settings, **others)

    monkeypatch.setattr(session_module, "choose", finite_but_for)
    with language() as server:
        status, told, _ = ask(server, CHAT, {**GOOD, "temperature": 1.5, "n": 2})
        assert (status, told["error"]["type"], told["error"]["code"]) == (500, "server_error", "no_token")
        assert is_alive(server)


def test_a_model_that_fails_fails_only_its_requests(
    language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Scheduler.step
    failing = [True]

    def fails(session: Scheduler) -> list[Running]:
        if session.num_waiting and failing and failing.pop():
            raise RuntimeError("out of memory: tried to allocate much")
        return step(session)

    monkeypatch.setattr(Scheduler, "step", fails)
    with language() as server:
        status, told, _ = ask(server, CHAT, GOOD)
        assert (status, told["error"]["code"]) == (500, "model_failed")
        assert "out of memory" in told["error"]["message"]
        assert is_alive(server)


@pytest.mark.filterwarnings("ignore")
def test_a_mistake_in_a_step_does_not_end_the_server(
    language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Scheduler.step
    failing = [True]

    def fails(session: Scheduler) -> list[Running]:
        if session.num_waiting and failing and failing.pop():
            raise KeyError("a mistake")
        return step(session)

    monkeypatch.setattr(Scheduler, "step", fails)
    with language() as server:
        assert ask(server, CHAT, GOOD)[0] == 500
        assert is_alive(server)


def test_a_request_that_cannot_join_ends_no_other(
    language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Scheduler.add

    def fails(session: Scheduler, prompts: Any, settings: Any, **others: Any) -> Any:
        if settings[0].seed == 13:
            raise OverflowError("a seed that does not fit")
        return add(session, prompts, settings, **others)

    monkeypatch.setattr(Scheduler, "add", fails)
    with language() as server, ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, server, CHAT, {**GOOD, **LONG, "max_tokens": 120})
        until(lambda: server.metric("loopos_active_rows") == 1)
        assert ask(server, CHAT, {**GOOD, "seed": 13})[0] == 400
        assert other.result()[0] == 200
