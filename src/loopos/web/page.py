"""What a page of the app is, and what pages share: the folder, JSON in and out.

A page is a Python module with its routes, a module `NAME.js` and a section `page-NAME` in `index.html` of the bundle.
To add one: write `web/NAME.py` with a function `page(context) -> Page`, list it in `web/application.py`, write
`static/NAME.js` with `export function start(section)`, and add `<section id="page-NAME" hidden>`. The security, the
navigation and the bundle then include it. Handlers that read files are plain functions, which run in a thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from loopos.config.diagnostics import UserError
from loopos.serving.errors import ApiError, gone
from loopos.serving.http import read_body
from loopos.storage.durable import JSON
from loopos.storage.events import finite
from loopos.storage.json_files import json_text

Background: TypeAlias = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every page gets. root: the folder that the app shows, resolved; no page reads or writes outside. cache: a
    folder for what can be made again, None for none. closing: set when the app stops.
    """

    root: Path
    cache: Path | None
    closing: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, kw_only=True)
class Page:
    """name: of its module in the bundle and its section. background: runs in a thread until `Context.closing`."""

    name: str
    title: str
    routes: Sequence[Route]
    background: Background | None = None


def answer(content: object, status: int = 200) -> Response:
    """A JSON response; numbers that are not finite become texts, as in the log."""
    text = json_text(finite(cast(JSON, content)), allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def write(path: str, handle: Callable[[Request, dict[str, Any]], Awaitable[Response] | Response], most: int) -> Route:
    """A route of a write: `handle` gets the request and the JSON object in its body of at most `most` bytes. It runs in
    the event loop, so it must be short.
    """

    async def endpoint(request: Request) -> Response:
        try:
            raw = await read_body(request, most)
        except ClientDisconnect as error:
            raise gone() from error
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ApiError(400, "the body is not a JSON object")
        try:
            result = handle(request, content)
            return result if isinstance(result, Response) else await result
        except UserError as problem:
            raise ApiError(409, str(problem)) from problem

    return Route(path, endpoint, methods=["POST"])


def text_of(content: dict[str, Any], key: str, *, most: int) -> str:
    """A text of a body. Raises `ApiError` for another type and for more than `most` characters."""
    value = content.get(key, "")
    if not isinstance(value, str) or len(value) > most:
        raise ApiError(400, f"{key}: expected a text of at most {most:,} characters", param=key)
    return value


def number_of(request: Request, key: str, default: float | None = None) -> float | None:
    """A number of the query. Raises `ApiError` for anything else."""
    text = request.query_params.get(key)
    if text is None or text == "":
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ApiError(400, f"{key}: got {text[:40]!r}; expected a number", param=key)
    return value


def whole_of(request: Request, key: str, default: int, *, low: int, high: int) -> int:
    """A whole number of the query. Raises `ApiError` for anything else and outside of the range."""
    value = number_of(request, key, default)
    if value is None or value != int(value) or not low <= value <= high:
        raise ApiError(400, f"{key}: expected a whole number from {low:,} to {high:,}", param=key)
    return int(value)
