"""The app over folders of runs: by starlette's client with a token, and as a server on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from loopos.serving.server import address_of, listening
from loopos.web import server
from loopos.web.page import Context

TOKEN = "a-token-of-the-tests"
HOST = "127.0.0.1:8000"
ORIGIN = f"http://{HOST}"
WAIT = 30


def until(holds: Callable[[], Any]) -> Any:
    """Waits for what must come; what it was."""
    for _ in range(100 * WAIT):
        if found := holds():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come")


class Client:
    """A browser with the cookie, on the app's own page."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def get(self, path: str, **query: Any) -> Any:
        response = self.client.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, **query: Any) -> tuple[int, str]:
        response = self.client.get(path, params=query)
        return response.status_code, response.json()["error"]["message"]

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        headers = {"Origin": ORIGIN, "Content-Type": "application/json"}
        response = self.client.post(path, content=json.dumps(content).encode(), headers=headers)
        return response.status_code, response.json()

    def run(self, name: str) -> dict[str, Any]:
        """The snapshot of a run, once there is one."""
        return until(lambda: next((run for run in self.get("/api/board/runs")["runs"] if run["name"] == name), None))


@contextmanager
def opened(root: Path, *, cache: Path | None = None) -> Iterator[Client]:
    """The app over a folder, with a client that has its cookie."""
    context = Context(root=root.resolve(), cache=cache)
    app = server.shield(context, token=TOKEN, host="127.0.0.1", port=8000)
    with TestClient(app, base_url=ORIGIN, cookies={"loopos_ui_8000": TOKEN}) as client:
        yield Client(client)


@contextmanager
def running(root: Path) -> Iterator[str]:
    """The app on a socket of loopback; its link."""
    stop: list[Callable[[], None]] = []
    with listening("127.0.0.1", 0, server.LIMITS) as bound:

        def serve() -> None:
            server.run(root, bound, token=TOKEN, host="127.0.0.1", cache=None, began=stop.append)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        until(lambda: stop)
        try:
            yield f"{address_of(bound)}/?token={TOKEN}"
        finally:
            stop[0]()
            thread.join(WAIT)
    assert not thread.is_alive()
