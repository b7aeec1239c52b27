"""Answers that wait for a model: with a time limit, and with an eye on whether anybody still reads.

Enters: the work of a request, or the chunks of a stream. Leaves: the answer, or an `ApiError`; of a stream, server-sent
events. A client that goes away, or reads more slowly than it may, ends the work at once. Left out: the work itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loopos.deploy.serving.errors import GONE, ApiError, gone, out_of_time

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def while_wanted(
    request: Request, work: Coroutine[Any, Any, Result], *, deadline: float, seconds: float
) -> Result:
    """What `work` gives. Raises `ApiError`: 408 at the deadline (of the event loop's clock; `seconds` names the limit),
    499 where the client went away. The work is then cancelled, and over when this returns.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await _first_of([task, left], deadline)
        if task.done():
            return task.result()
        raise gone() if left.done() else out_of_time(seconds)
    finally:
        await _ended(task, left)


class EventStream(Response):
    """A stream of server-sent events, whose first one is there already."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        overflowed: asyncio.Event,
        ended: Callable[[], None],
        cut: Callable[[str], None],
        deadline: float,
        seconds: float,
    ) -> None:
        """overflowed: set where the reader is too far behind. ended: called when nothing is sent any more. cut: told
        the reason when the connection is cut, which the scope's state must be able to (`abort`).
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._overflowed, self._finish, self._cut = events, overflowed, ended, cut
        self._deadline, self._seconds = deadline, seconds
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(_until_gone(receive))
        slow = asyncio.ensure_future(self._overflowed.wait())
        try:
            await _first_of([task, left, slow], self._deadline)
            if task.done():
                task.result()
            elif left.done():
                scope["state"]["ended_as"] = GONE
            elif slow.done() or self._is_sending:
                self._cut("slow_reader" if slow.done() else "timeout")
                scope["state"]["ended_as"] = 408
                scope["state"]["abort"]()
                # The server learns of the cut in its next turns.
                await asyncio.wait([left], timeout=1)
            else:
                scope["state"]["ended_as"] = 408
                await _ended(task)
                await self._send(send, event(out_of_time(self._seconds).body()), more=False)
        finally:
            await _ended(task, left, slow)
            self._finish()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await self._send(send, chunk, more=True)
        except ApiError as error:
            await self._send(send, event(error.body()), more=False)
            return
        await self._send(send, DONE, more=False)

    async def _send(self, send: Send, chunk: bytes, *, more: bool) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._is_sending = False


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(tasks: list[asyncio.Future[Any]], deadline: float) -> None:
    """Waits until one is done, or the deadline has come."""
    timeout = max(0.0, deadline - asyncio.get_running_loop().time())
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels them, and waits until they are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
