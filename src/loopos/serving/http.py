"""The HTTP side of a server: routes, keys, bodies, errors, health and metrics.

Enters: requests. Leaves: OpenAI's JSON, also for every error. What a request must be is checked in this order: the
server takes requests (503), the key (401), the path (404) and method (405), the type of the body (415) and its size
(413), then its content. Left out: what a model answers (`language.py`, `heads.py`), sockets and signals
(`deploy.serve`).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loopos.serving.errors import ApiError, gone, out_of_time, stopping
from loopos.serving.limits import LOOPBACK_NAMES, ServingLimits
from loopos.serving.metrics import CONTENT_TYPE, ServingMetrics

ENDPOINTS = {
    "/v1/chat/completions": "a language model",
    "/v1/completions": "a language model",
    "/v1/embeddings": "a language model",
    "/v1/classify": "a model that was fine-tuned with a head",
    "/v1/score": "a reward model",
}
"""What a model answers → the kind that does."""
_OPEN = frozenset({"/health", "/health/ready"})
# A body over the limit is read and thrown away up to so many times the limit, so that its sender gets the answer.
_THROWN_AWAY = 32
Answer = Callable[[Request, bytes, float], Awaitable[Response]]


class Service(Protocol):
    """A model that answers requests. `kind`: what it is, in words."""

    name: str
    kind: str

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        """Path → what answers it: (request, its body, deadline by the event loop's clock)."""
        ...

    @property
    def is_ready(self) -> bool: ...

    async def open(self) -> None: ...

    async def end(self) -> None:
        """Ends what still runs; it is answered by an error."""
        ...

    async def close(self) -> None: ...


class Gate:
    """The outermost layer: who may ask and whether anybody may, and the account of what was asked.

    `num_running`: requests that are not over. `is_stopping`: new ones are refused.
    """

    def __init__(self, app: ASGIApp, metrics: ServingMetrics, *, api_key: str | None) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if api_key is None else api_key.encode("ascii")
        self.num_running, self.is_stopping = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        began = state["began"] = asyncio.get_running_loop().time()
        state["is_stopping"] = self.is_stopping
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.num_running += 1
        try:
            refusal = self._refusal(scope)
            app: ASGIApp = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, watched)
        finally:
            self.num_running -= 1
            known = scope["path"] in ENDPOINTS or scope["path"].startswith("/v1/models") or scope["path"] in _OPEN
            endpoint = "/v1/models" if scope["path"].startswith("/v1/models") else scope["path"]
            seconds = asyncio.get_running_loop().time() - began
            if scope["path"] != "/metrics":
                self._metrics.ended(endpoint if known else "other", state.get("ended_as", status), seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in _OPEN:
            return None
        if self.is_stopping:
            return stopping()
        headers = dict(scope["headers"])
        if self._key is None:
            # Without a key a page in a browser could come in by a name of its own that leads to this machine.
            host = headers.get(b"host", b"").decode("latin-1")
            if _name_in(host) not in LOOPBACK_NAMES:
                return ApiError(403, f"host {host!r}: without an API key this server answers to localhost alone")
            return None
        word, _, actual = headers.get(b"authorization", b"").partition(b" ")
        if word.lower() == b"bearer" and hmac.compare_digest(actual.strip(), self._key):
            return None
        told = "wrong API key" if actual else "no API key; expected the header Authorization: Bearer KEY"
        return ApiError(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def application(service: Service, limits: ServingLimits, metrics: ServingMetrics) -> Starlette:
    """Everything behind the gate."""

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != service.name:
            raise ApiError(404, f"model: no {asked!r} here", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "live", "ready": is_ready(request), "model": service.name})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": is_ready(request)}, 200 if is_ready(request) else 503)

    def is_ready(request: Request) -> bool:
        return service.is_ready and not request.scope["state"]["is_stopping"]

    async def numbers(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.open()
        try:
            yield
        finally:
            await service.close()

    asked = [
        Route(path, _endpoint(path, service.endpoints.get(path), service, limits), methods=["POST"])
        for path in ENDPOINTS
    ]
    return Starlette(
        routes=[
            *asked,
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/health/ready", ready),
            Route("/metrics", numbers),
        ],
        exception_handlers={ApiError: _told, HTTPException: _told_http, Exception: _told_broken},
        lifespan=lifespan,
    )


def _name_in(host: str) -> str:
    """The name in a header Host, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "loopos"}


def _endpoint(
    path: str, answer: Answer | None, service: Service, limits: ServingLimits
) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        if answer is None:
            raise ApiError(
                404,
                f"{path}: {service.name!r} is {service.kind}, which answers {', '.join(service.endpoints)}; "
                f"{path} is answered by {ENDPOINTS[path]}",
                code="wrong_kind_of_model",
            )
        deadline = request.scope["state"]["began"] + limits.max_seconds
        try:
            async with asyncio.timeout_at(deadline):
                raw = await read_body(request, limits.max_body)
        except TimeoutError as error:
            raise out_of_time(limits.max_seconds) from error
        except ClientDisconnect as error:
            raise gone() from error
        return await answer(request, raw, deadline)

    return handle


async def read_body(request: Request, most: int) -> bytes:
    """The body. Raises `ApiError`: 415 for another type than JSON, 413 for more than `most` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page in a browser may send any other type to a server on the same machine without asking it first.
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: got {kind or 'none'}; expected application/json", code="wrong_type")
    told = request.headers.get("content-length", "0")
    over = told.isdecimal() and int(told) > most
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        over = over or size > most
        if over:
            parts.clear()
        else:
            parts.append(part)
        if size > most * _THROWN_AWAY:
            break
    if over:
        raise ApiError(
            413,
            f"a body of more than {most:,} bytes, this server's limit",
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _told_http(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = f"{path}: there is no such path" if error.status_code == 404 else f"{method} {path}: not allowed"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


async def _told_broken(_: Request, __: Exception) -> Response:
    """An error of ours: its traceback goes to the server's log, not to the client."""
    return error_response(ApiError(500, "the server made a mistake; its log has the reason", code="internal_error"))
