"""Servers on loopback: the command in a forked process, and services in a thread of the test."""

from __future__ import annotations

import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forked import Child
from openai import OpenAI

from loopos.cli.commands import app
from loopos.evaluation.reasoning import Reasoner
from loopos.serving.http import Service
from loopos.serving.language import LanguageService
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.serving.server import address_of, listening, serve

WAIT = 60
LISTENS = re.compile(r"^(\S+): .* at (http://\S+) ", re.MULTILINE)


@dataclass
class Server:
    """`url` of a server, the `name` of its model, and how to end it."""

    url: str
    name: str
    stop: Callable[[], None]
    clients: dict[str, OpenAI] = field(default_factory=dict)

    def client(self, key: str = "none") -> OpenAI:
        """A client that is closed with the server."""
        if key not in self.clients:
            self.clients[key] = self.fresh(key)
        return self.clients[key]

    def fresh(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def metric(self, name: str, key: str = "") -> float:
        """The value of a line of /metrics."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(asked, timeout=WAIT) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name]
        return float(found[0]) if found else 0.0


def until(holds: Callable[[], bool]) -> None:
    """Waits for what must come."""
    for _ in range(100 * WAIT):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


@contextmanager
def command(*words: object) -> Iterator[tuple[Server, Child]]:
    """`loopos serve` with these arguments, on a free port, in a forked process; the server and its process."""
    line = ["serve", *map(str, words), "--port", "0", "--device", "cpu"]
    with Child(lambda: app(line)) as process:
        until(lambda: LISTENS.search(process.errors) is not None or process.poll() is not None)
        found = LISTENS.search(process.errors)
        assert found is not None, process.errors
        server = Server(found[2], found[1], lambda: process.send_signal(signal.SIGTERM))
        yield server, process
        server.close()


@contextmanager
def served(
    service: Service, limits: ServingLimits, metrics: ServingMetrics, key: str | None = None
) -> Iterator[Server]:
    """A service in a thread."""
    stops: list[Callable[[], None]] = []
    began = threading.Event()

    def note(stop: Callable[[], None]) -> None:
        stops.append(stop)
        began.set()

    with listening("127.0.0.1", 0, limits) as bound:
        thread = threading.Thread(
            target=serve, args=(service, metrics, bound, limits), kwargs={"api_key": key, "began": note}
        )
        url = address_of(bound)
        thread.start()
        assert began.wait(WAIT)
        server = Server(url, service.name, stops[0])
        try:
            yield server
        finally:
            server.close()
            stops[0]()
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def reasoner(pico_folder: Path) -> Reasoner:
    """The pico model, run in the test's own process."""
    return Reasoner.open(str(pico_folder))


@pytest.fixture(scope="session")
def server(pico_folder: Path) -> Iterator[Server]:
    """The command, serving the pico model with four rows."""
    with command(pico_folder, "--name", "pico", "--max-rows", 4, "--max-tokens", 200) as (made, _):
        yield made


@pytest.fixture
def language(pico_folder: Path) -> Callable[..., Any]:
    """`with language(max_queue=2) as server`: the pico model in a thread, with these limits."""

    @contextmanager
    def build(*, key: str | None = None, **limits: Any) -> Iterator[Server]:
        bounds, metrics = ServingLimits(**{"max_rows": 4, **limits}), ServingMetrics()
        own = Reasoner.open(str(pico_folder), max_rows=bounds.max_rows)
        with served(LanguageService(own, "pico", bounds, metrics), bounds, metrics, key) as made:
            yield made

    return build
