"""`loopos serve`: mistakes found before torch is imported, kinds of models, and the orderly shutdown."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke
from tests.serving.conftest import Server, command, until


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        (("--host", "0.0.0.0"), "--host: got 0.0.0.0, which other machines can reach, without an API key"),
        (("--host", "models.example"), "without an API key"),
        (("--api-key", " "), "--api-key: got a blank or non-ASCII key"),
        (("--port", 70000), "--port: got 70000; expected 0"),
        (("--max-rows", 0), "--max-rows: got 0; expected 1 to 4096"),
        (("--max-seconds", "nan"), "--max-seconds: got nan"),
        (("--device", "tpu"), "--device: got tpu"),
    ],
)
def test_diagnostics(words: tuple[object, ...], summary: str, language_run: Path, invoke: Invoke) -> None:
    result = invoke("serve", language_run, *words)
    assert result.exit_code == 2
    assert summary in result.stderr


def test_all_diagnostics_come_at_once_and_without_torch() -> None:
    program = (
        "import sys\n"
        "from loopos.cli.commands import app\n"
        "try:\n"
        "    app(['serve', 'x', '--host', '0.0.0.0', '--max-rows', '0', '--max-body', '0'], standalone_mode=False)\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'starlette', 'uvicorn'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert [name in ended.stderr for name in ("--host", "--max-rows", "--max-body")] == [True] * 3, ended.stderr


def test_a_port_that_is_taken(language_run: Path, invoke: Invoke) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = invoke("serve", language_run, "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "cannot listen there" in result.stderr


def test_no_model_there(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("serve", tmp_path)
    assert result.exit_code == 2
    assert "no trained model here" in result.stderr


def test_without_the_extra_it_says_how_to_get_it(
    language_run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke("serve", language_run)
    assert result.exit_code == 1
    assert 'pip install -e ".[serve]"' in result.stderr


def ask(server: Server, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    raw = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{server.url}{path}", raw, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_orderly_end(language_run: Path) -> None:
    """What runs is finished, what comes is refused, the code is 0. The name is the run's folder."""
    answers: list[tuple[int, dict[str, Any]]] = []
    with command(language_run, "--max-rows", 8) as (server, process):
        assert server.name == language_run.name
        body = {
            "model": server.name,
            "prompt": "where",
            "max_tokens": 240,
            "n": 8,
            "logit_bias": {"2": -100},
            "seed": 1,
        }
        runs = threading.Thread(target=lambda: answers.append(ask(server, "/v1/completions", body)))
        runs.start()
        until(lambda: server.metric("loopos_active_rows") == 8)
        process.send_signal(signal.SIGTERM)
        until(lambda: ask(server, "/v1/models")[0] == 503)
        runs.join(60)
        assert process.wait(time.monotonic() + 60) == 0
    ((status, told),) = answers
    assert status == 200
    assert told["usage"]["completion_tokens"] == 8 * 240


def test_requests_that_outlast_the_grace_period_are_reported(language_run: Path) -> None:
    answers: list[tuple[int, dict[str, Any]]] = []
    with command(language_run, "--grace-seconds", 0) as (server, process):
        body = {"model": server.name, "prompt": "where", "max_tokens": 240, "n": 100, "logit_bias": {"2": -100}}
        runs = threading.Thread(target=lambda: answers.append(ask(server, "/v1/completions", body)))
        runs.start()
        until(lambda: server.metric("loopos_active_rows") == 16)
        server.stop()
        assert process.wait(time.monotonic() + 60) == 0
        assert "Traceback" not in process.errors
        runs.join(60)
    assert [(status, told["error"]["code"]) for status, told in answers] == [(503, "stopping")]


def test_a_closed_terminal_ends_the_server_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP does what SIGTERM does; where it is ignored (nohup), it stays ignored."""
    from loopos.serving.server import _Server

    server = _Server.__new__(_Server)
    server._captured_signals = []
    received: list[int] = []
    monkeypatch.setattr(server, "handle_exit", lambda number, frame: received.append(number))
    before = signal.getsignal(signal.SIGHUP)
    with server.capture_signals():
        for name in ("SIGHUP", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[name])
    assert received == [signal.SIGHUP, signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
