"""The app behind `Shield`: the pages, the bundle, and errors as JSON.

Enters: a `Context`. Leaves: a Starlette application. The files of the bundle are listed once and found by their name,
so that no path of a request is ever looked up on the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import loopos
from loopos.config.diagnostics import UserError
from loopos.serving.errors import ApiError
from loopos.serving.http import error_response
from loopos.web import board
from loopos.web.page import Context, Page, answer

PAGES: Sequence[Callable[[Context], Page]] = (board.page,)
"""The pages, in the order of the navigation."""
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def bundle() -> Mapping[str, _File]:
    """The files of the bundle by their path in it."""
    return dict(_files_in(resources.files("loopos.web") / "static"))


def _files_in(folder: Traversable, above: str = "") -> list[tuple[str, _File]]:
    found = []
    for each in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if each.is_dir():
            found += _files_in(each, f"{above}{each.name}/")
        elif (kind := each.name.rpartition(".")[2]) in _TYPES:
            content = each.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found.append((f"{above}{each.name}", _File(content, _TYPES[kind], etag)))
    return found


def application(context: Context) -> Starlette:
    """The app of all pages."""
    pages = [make(context) for make in PAGES]
    files = bundle()

    async def index(request: Request) -> Response:
        return _file(files["index.html"], request)

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["path"])
        if file is None:
            raise HTTPException(404)
        return _file(file, request)

    async def session(_: Request) -> Response:
        listed = [{"name": page.name, "title": page.title} for page in pages]
        return answer({"folder": str(context.root), "version": loopos.__version__, "pages": listed})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        threads = [
            threading.Thread(target=page.background, name=f"ui-{page.name}", daemon=True)
            for page in pages
            if page.background is not None
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            context.closing.set()
            for thread in threads:
                await asyncio.to_thread(thread.join)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/static/{path:path}", static),
            Route("/api/session", session),
            *(route for page in pages for route in page.routes),
        ],
        exception_handlers={
            ApiError: _api_error,
            UserError: _user_error,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )


def _file(file: _File, request: Request) -> Response:
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _user_error(_: Request, error: Exception) -> Response:
    return error_response(ApiError(409, str(error)))


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods. The path is not repeated: it may be anything."""
    assert isinstance(error, HTTPException)
    message = {404: "no such page", 405: f"{request.method}: not allowed here"}.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _internal_error(_: Request, __: Exception) -> Response:
    """A bug: its traceback goes to the terminal of `loopos ui`, not to the page."""
    return error_response(ApiError(500, "internal error; the terminal of loopos ui shows it"))
