"""Requests that the tests of serving send."""

from __future__ import annotations

import http.client
import json
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from tests.serving.conftest import Server

Chat: TypeAlias = dict[str, Any]
ASKED: Any = [{"role": "user", "content": "where is the parcel"}]
# Of the pico model's end token.
NEVER_ENDS = {"2": -100}
JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
GOOD: Chat = {"model": "pico", "messages": ASKED, "max_tokens": 2}


def ask(
    server: Server, path: str, body: object, *, method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of an answer; a body that is no bytes is sent as JSON."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw, JSON if headers is None else headers)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told, {name.lower(): value for name, value in answer.getheaders()}
