"""Clients that open connections and are slow, or many: others are served, and nothing spins."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from questions import CHAT, GOOD, ask

from tests.serving.conftest import WAIT, Server, until

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connected(server: Server) -> socket.socket:
    place = urlsplit(server.url)
    return socket.create_connection((place.hostname, place.port or 0), timeout=WAIT)


def answered(client: socket.socket) -> bool:
    """Whether a whole answer to HEALTH comes."""
    client.sendall(HEALTH)
    got = b""
    while b'"model"' not in got:
        part = client.recv(4096)
        if not part:
            return False
        got += part
    return got.startswith(b"HTTP/1.1 200")


def seconds_until_closed(client: socket.socket, sent: bytes, *, every: float = 0.05) -> float:
    """How long a connection stays open to which these bytes are sent one by one, again and again, and that is not read
    to its end before.
    """
    began = time.monotonic()
    client.settimeout(every)
    position = 0
    while time.monotonic() - began < WAIT:
        try:
            client.sendall(sent[position % len(sent) :][:1])
            position += 1
            if not client.recv(4096):
                return time.monotonic() - began
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - began
    raise AssertionError("it stays open")


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nX: " + b"a" * 4000, b"\r\n"], ids=["header", "blank lines"])
@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_a_header_that_never_ends_ends_its_connection(earlier: int, sent: bytes, language: Callable[..., Any]) -> None:
    """The first of a connection, and one behind requests that were answered."""
    with language(header_seconds=0.4) as server, connected(server) as client:
        for _ in range(earlier):
            assert answered(client)
        assert seconds_until_closed(client, sent) < 10
        assert ask(server, CHAT, GOOD)[0] == 200


def test_a_silent_connection_is_closed(language: Callable[..., Any]) -> None:
    with language(header_seconds=0.3) as server, connected(server) as client:
        assert client.recv(1) == b""


def test_a_slow_answer_is_no_slow_header(language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from loopos.generation.scheduler import Scheduler

    step = Scheduler.step

    def slowly(session: Scheduler) -> Any:
        time.sleep(0.02)
        return step(session)

    monkeypatch.setattr(Scheduler, "step", slowly)
    with language(header_seconds=0.2) as server:
        status, told, _ = ask(server, CHAT, {**GOOD, "max_tokens": 40, "logit_bias": {"2": -100}})
        assert (status, told["usage"]["completion_tokens"]) == (200, 40)


def test_connections_over_the_bound_wait_for_room(language: Callable[..., Any]) -> None:
    with language(max_connections=3, header_seconds=60) as server, ExitStack() as stack:
        held = [stack.enter_context(connected(server)) for _ in range(3)]
        for client in held:
            client.sendall(HEALTH[:10])
        late = stack.enter_context(connected(server))
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            answered(late)
        held[0].close()
        late.settimeout(WAIT)
        assert late.recv(64).startswith(b"HTTP/1.1 200")


def test_a_connection_between_two_requests_makes_room(language: Callable[..., Any]) -> None:
    with language(max_connections=2, idle_seconds=60) as server, ExitStack() as stack:
        idle = [stack.enter_context(connected(server)) for _ in range(2)]
        assert all(answered(client) for client in idle)
        late = stack.enter_context(connected(server))
        assert answered(late)
        assert idle[0].recv(1) == b""


def test_without_descriptors_new_connections_wait_and_nothing_spins(
    language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    accept = asyncio.selector_events.BaseSelectorEventLoop.sock_accept
    none_left = False
    tries = 0

    async def refusing(loop: Any, bound: socket.socket) -> Any:
        nonlocal tries
        connection, address = await accept(loop, bound)
        if none_left:
            tries += 1
            connection.close()
            raise OSError(errno.EMFILE, "Too many open files")
        return connection, address

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_accept", refusing)
    with language() as server, connected(server) as early:
        assert answered(early)
        none_left = True
        with ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(connected(server))
            until(lambda: tries >= 2)
            time.sleep(0.6)
            assert tries <= 6
        none_left = False
        assert ask(server, CHAT, GOOD)[0] == 200
    summary = capfd.readouterr().err
    assert summary.count("Too many open files: new connections wait") == 1
    assert "Traceback" not in summary


@pytest.mark.slow
def test_a_server_with_few_descriptors(pico_folder: Path, tmp_path: Path) -> None:
    """A process that may open 96 files, and 200 clients: it answers, rests, and writes one line."""
    log = (tmp_path / "log").open("w+")
    line = [sys.executable, "-m", "loopos", "serve", str(pico_folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*line, "--header-seconds", "3"],
        stderr=log,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96)),
    )
    try:
        until(lambda: "http://" in (tmp_path / "log").read_text())
        url = next(word for word in (tmp_path / "log").read_text().split() if word.startswith("http://"))
        server = Server(url, "pico", process.terminate)
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(connected(server)).sendall(HEALTH[:10])
            before = psutil.Process(process.pid).cpu_times().user
            time.sleep(2)
            assert psutil.Process(process.pid).cpu_times().user - before < 0.5
            # The slow ones are closed in time, and others get their place.
            with connected(server) as client:
                client.settimeout(60)
                assert answered(client)
        text = (tmp_path / "log").read_text()
        assert "Traceback" not in text
        assert len(text) < 5000
    finally:
        process.kill()
        process.wait()
        log.close()
