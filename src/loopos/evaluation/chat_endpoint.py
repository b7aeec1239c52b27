"""A client of chat completions as OpenAI's API has them: vLLM, SGLang, Ollama, llama.cpp, `loopos serve` and others.

The key comes from an environment variable only. Standard library only. Apart from its users, which judge or sample.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.data.record import shown

# Too many requests, and faults of a server that may pass.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0


class EndpointFailed(UserError):
    """The endpoint did not answer a request, in all attempts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` of the first choice; `tokens` of request and reply together, as the server counts them (0: it does not
    say), `written` those of the reply; `ended`: by itself, not by a limit.
    """

    text: str
    tokens: int
    written: int = 0
    ended: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatEndpoint:
    """`base_url`: up to `/v1`. `api_key_env`: the variable that holds the key; None: requests have no key. `timeout`:
    of a request, in seconds. `retries`: attempts after the first, with waits of 0.5, 1, 2 … seconds, or as the server
    asks for, at most 60.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 5

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f'base_url: got {shown(self.base_url)}; expected a URL such as "http://localhost:8000/v1"')
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise UserError(f"api_key_env: the environment variable {self.api_key_env} is not set")

    def complete(self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> Reply:
        """The reply to messages. parameters: of the request, such as temperature. Raises `EndpointFailed`, and
        `UserError` for a request that the server refuses.
        """
        body = json.dumps({"model": self.model, "messages": [*messages], **parameters}).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for attempt in range(self.retries + 1):
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, body, headers), timeout=self.timeout
                ) as response:
                    return _reply(response.read())
            except urllib.error.HTTPError as problem:
                with problem:
                    body_text = problem.read(2000).decode("utf-8", "replace")
                if problem.code not in _PASSING:
                    raise UserError(f"{url}: answered {problem.code} {problem.reason}: {shown(body_text)}") from problem
                reason, wait = f"answered {problem.code} {problem.reason}", _wait_of(problem, wait)
            except (OSError, HTTPException, ValueError) as problem:
                # No connection, no reply in time, or none in the form of the API.
                reason = f"{type(problem).__name__}: {problem}"
            if attempt < self.retries:
                time.sleep(wait)
        raise EndpointFailed(f"{url}: {reason}, in {self.retries + 1} attempts")


def _wait_of(problem: urllib.error.HTTPError, wait: float) -> float:
    """The wait that a server asks for in seconds, or `wait`."""
    try:
        return min(float(problem.headers.get("Retry-After", wait)), _LONGEST_WAIT)
    except ValueError:
        return wait


def _reply(content: bytes) -> Reply:
    """Raises ValueError for another form."""
    try:
        found = json.loads(content)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
        return Reply(text or "", int(usage.get("total_tokens", 0)), int(usage.get("completion_tokens", 0)), ended)
    except (KeyError, IndexError, TypeError, AttributeError) as problem:
        raise ValueError(f"the reply {shown(content.decode('utf-8', 'replace'))} has no message") from problem
