"""The HTTP side of a server: routes, API keys, bodies, errors, health and metrics.

All responses, errors included, are OpenAI's JSON. A request is checked in this order: the server accepts requests
(503), the API key (401), the path (404) and method (405), the content type (415), the size of the body (413), its
content.
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
"""Endpoint → the kind of model that answers it."""
_OPEN = frozenset({"/health", "/health/ready"})
# A body over the limit is read and discarded, up to this many times the limit, so that its sender gets the response.
_DISCARD_FACTOR = 32
Answer = Callable[[Request, bytes, float], Awaitable[Response]]


class Service(Protocol):
    """A model that answers requests. `kind`: describes it."""

    name: str
    kind: str

    @property
    def endpoints(self) -> dict[str, Callable[[Request, bytes, float], Any]]:
        """Path → its handler: (request, its body, deadline by the event loop's clock)."""
        ...

    @property
    def is_ready(self) -> bool: ...

    async def open(self) -> None: ...

    async def end(self) -> None:
        """Ends what still runs; its requests get an error."""
        ...

    async def close(self) -> None: ...


class Middleware:
    """The outermost layer: checks keys, refuses requests when stopping, and counts requests.

    `num_running`: requests in progress. `is_stopping`: new ones are refused.
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
            # Without a key, a web page could reach this server through a host name of its own that resolves to this
            # machine.
            host = headers.get(b"host", b"").decode("latin-1")
            if _name_in(host) not in LOOPBACK_NAMES:
                return ApiError(403, f"host {host!r}: without an API key this server answers only to localhost")
            return None
        scheme, _, actual = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(actual.strip(), self._key):
            return None
        message = "wrong API key" if actual else "no API key; expected the header Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def application(service: Service, limits: ServingLimits, metrics: ServingMetrics) -> Starlette:
    """Everything behind the middleware."""

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        requested = request.path_params["name"]
        if requested != service.name:
            raise ApiError(404, f"model: no {requested!r} here", param="model", code="model_not_found")
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

    endpoints = [
        Route(path, _endpoint(path, service.endpoints.get(path), service, limits), methods=["POST"])
        for path in ENDPOINTS
    ]
    return Starlette(
        routes=[
            *endpoints,
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/health/ready", ready),
            Route("/metrics", numbers),
        ],
        exception_handlers={
            ApiError: _api_error_response,
            HTTPException: _http_error_response,
            Exception: _internal_error_response,
        },
        lifespan=lifespan,
    )


def _name_in(host: str) -> str:
    """The host name in a Host header, without its port."""
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
                f"{path}: {service.name!r} is {service.kind}, which serves {', '.join(service.endpoints)}; "
                f"{path} needs {ENDPOINTS[path]}",
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
    """The body. Raises `ApiError`: 415 for a type other than JSON, 413 for more than `most` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page can send any other type to a server on the same machine without a preflight request.
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: got {kind or 'none'}; expected application/json", code="wrong_type")
    length = request.headers.get("content-length", "0")
    over = length.isdecimal() and int(length) > most
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        over = over or size > most
        if over:
            parts.clear()
        else:
            parts.append(part)
        if size > most * _DISCARD_FACTOR:
            break
    if over:
        raise ApiError(
            413,
            f"the body exceeds this server's limit of {most:,} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


async def _api_error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error_response(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = f"{path}: no such path" if error.status_code == 404 else f"{method} {path}: not allowed"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


async def _internal_error_response(_: Request, __: Exception) -> Response:
    """A bug: its traceback goes to the server's log, not to the client."""
    return error_response(ApiError(500, "internal server error; see the server's log", code="internal_error"))
