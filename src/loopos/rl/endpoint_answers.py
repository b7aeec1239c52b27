"""Answers of a teacher behind an OpenAI-compatible endpoint, for `loopos sample`: texts only, from which any model can
learn by `sft`.

Several requests are under way at once; a killed command repeats at most those of one chunk. Apart from the command,
which parses options and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.data.digest import prompts_digest
from loopos.evaluation.chat_endpoint import ChatEndpoint
from loopos.evaluation.checkers import Sample
from loopos.generation.settings import SamplingFields
from loopos.rl.rejection_sampling import Request

ANSWERS_OF_A_CHUNK = 32
"""Answers that a kill costs at most."""
_AT_ONCE = 8


class EndpointAnswers:
    """n answers to each request: `EndpointAnswers(endpoint, settings, n, count)(requests)`."""

    def __init__(self, endpoint: ChatEndpoint, settings: SamplingFields, n: int, count: Callable[[str], int]) -> None:
        """count: tokens of a text, where the server does not say."""
        self._endpoint, self._settings, self.n, self._count = endpoint, settings, n, count

    def identity(self, requests: Sequence[Request], chunk: int) -> dict[str, Any]:
        """What the answers depend on, as far as it is known."""
        settings = self._settings
        return {
            "endpoint": self._endpoint.base_url,
            "model": self._endpoint.model,
            "prompts": prompts_digest(request.ids for request in requests),
            "samples": self.n,
            "chunk": chunk,
            **{f"sampling.{name}": value for name, value in self._parameters(settings.seed).items()},
        }

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        """Raises `UserError` for a request that the endpoint refuses or fails to answer."""
        each = [(request, number) for request in requests for number in range(self.n)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda one: self._answer(*one), each))

    def _answer(self, request: Request, number: int) -> Sample:
        if isinstance(request.content, str) or request.tools:
            raise UserError(f"{request.row.location}: an endpoint answers messages without tools")
        messages: list[Mapping[str, str]] = [
            {"role": message.role, "content": message.content} for message in request.content
        ]
        reply = self._endpoint.complete(messages, self._parameters(self._settings.seed + number))
        return Sample(reply.text, reply.written or self._count(reply.text), reply.ended)

    def _parameters(self, seed: int) -> dict[str, Any]:
        settings = self._settings
        stop = {"stop": list(settings.stop)} if settings.stop else {}
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
            **stop,
        }
