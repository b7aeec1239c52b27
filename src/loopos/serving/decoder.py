"""The model's thread, and the completions that decode in it while requests come and go.

Enters: tickets (prompts with settings) and functions that run the model, at any time, from the event loop. Leaves:
tokens as they come, or whole completions. One thread runs the model; the event loop hands it one step after another,
so that it never waits for a product of matrices and the model meets no lock. Left out: HTTP (`http.py`), what
a token looks like in JSON (`forms.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from loopos.config.diagnostics import UserError
from loopos.generation.completions import Completion, Running, TokenDelta
from loopos.generation.engine import Engine
from loopos.generation.scheduler import Scheduler
from loopos.generation.settings import SamplingSettings
from loopos.serving.errors import ApiError, stopping
from loopos.serving.limits import ServingLimits

Result = TypeVar("Result")
# Prompt tokens that one step takes in at most before rows that decode get their turn.
_ADMITTED_TOKENS = 2048


class Ticket:
    """Completions that a request waits for. `overflowed`: its reader is further behind than it may be."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingSettings],
        *,
        n: int,
        streams: bool,
        max_lag: int,
    ) -> None:
        self.prompts, self.settings, self.n, self.streams = prompts, settings, n, streams
        self.handles: list[Running] = []
        self.has_left = False
        self.overflowed = asyncio.Event()
        self._max_lag = max_lag * self.count
        self._events: deque[TokenDelta | list[Completion] | ApiError] = deque()
        self._arrived = asyncio.Event()

    @property
    def count(self) -> int:
        """Completions of all prompts."""
        return len(self.prompts) * self.n

    def deliver(self, event: TokenDelta | list[Completion] | ApiError) -> None:
        """Puts an event where the request finds it."""
        self._events.append(event)
        self._arrived.set()
        if len(self._events) > self._max_lag:
            self.overflowed.set()

    async def pieces(self) -> AsyncIterator[TokenDelta]:
        """The tokens of all completions as they come. Raises `ApiError` where the model failed."""
        ended = 0
        while ended < self.count:
            piece = await self._next()
            assert isinstance(piece, TokenDelta)
            ended += piece.finish_reason is not None
            yield piece

    async def completions(self) -> list[Completion]:
        """All completions, in the order of `Engine.generate`. Raises `ApiError` where the model failed."""
        found = await self._next()
        assert isinstance(found, list)
        return found

    async def _next(self) -> TokenDelta | list[Completion]:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, ApiError):
            raise event
        return event


class ModelThread:
    """One thread for all that runs the model, in the order in which it was asked for."""

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.num_calls = 0

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What a function returns or raises. The event loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The same for a request. Raises `ApiError` (429) where too many wait."""
        if self.num_calls > self._limits.max_queue:
            raise queue_full(self._limits.max_queue)
        self.num_calls += 1
        try:
            return await self.run(function, *arguments)
        finally:
            self.num_calls -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Decoder:
    """Completions of many requests in the rows of one engine, until `close`."""

    def __init__(self, engine: Engine, thread: ModelThread, limits: ServingLimits) -> None:
        self._engine, self._thread, self._limits = engine, thread, limits
        self._stack = ExitStack()
        self._session: Scheduler | None = None
        self._pump: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._joining: list[Ticket] = []
        self._leaving: list[Ticket] = []
        self._owners: dict[Running, Ticket] = {}
        self._live: set[Ticket] = set()
        self._counts = (0, 0)

    async def open(self) -> None:
        """Sets the model for generation and begins to take tickets."""
        await self._thread.run(self._begin)
        self._pump = asyncio.create_task(self._run())
        self._pump.add_done_callback(self._ended)

    async def end(self) -> None:
        """Takes no more tickets; those that still wait get an `ApiError`."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    async def close(self) -> None:
        """Ends, and gives the model back as it was."""
        await self.end()
        await self._thread.run(self._stack.close)

    @property
    def is_ready(self) -> bool:
        return self._pump is not None and not self._pump.done()

    @property
    def num_active(self) -> int:
        """Rows that decode."""
        return self._counts[0]

    @property
    def num_waiting(self) -> int:
        """Completions without a row."""
        return self._counts[1] + sum(ticket.count for ticket in self._joining)

    def submit(self, ticket: Ticket) -> None:
        """Takes a ticket in. Raises `ApiError`: 429 where too many completions wait, 503 where none are made."""
        if not self.is_ready:
            raise stopping()
        room = self._limits.max_rows + self._limits.max_queue - sum(each.count for each in self._live)
        if ticket.count > room:
            raise queue_full(self._limits.max_queue)
        self._live.add(ticket)
        self._joining.append(ticket)
        self._wake.set()

    def leave(self, ticket: Ticket) -> None:
        """Frees the rows of a ticket. One that is done stays as it is."""
        if ticket in self._live:
            self._live.discard(ticket)
            ticket.has_left = True
            self._leaving.append(ticket)
            self._wake.set()

    async def _run(self) -> None:
        while True:
            if not (self._joining or self._leaving or any(self._counts)):
                self._wake.clear()
                await self._wake.wait()
            joining, self._joining = self._joining, []
            leaving, self._leaving = self._leaving, []
            turn = asyncio.ensure_future(self._thread.run(self._turn, joining, leaving))
            await asyncio.wait([turn])
            problem = turn.exception()
            if problem is not None:
                await self._after_failure(problem)
                continue
            news = turn.result()
            for ticket, event in news:
                if not ticket.has_left:
                    ticket.deliver(event)
            self._live -= {ticket for ticket in self._live if _is_done(ticket)}

    async def _after_failure(self, problem: BaseException) -> None:
        """Answers those that decode by an error, and begins anew: whatever failed, the next request is served."""
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        self._fail(ApiError(500, f"the model failed: {first}", code="model_failed"))
        if not isinstance(problem, RuntimeError | MemoryError | UserError):
            # A mistake of ours: its traceback goes to the server's log.
            asyncio.get_running_loop().call_exception_handler({"message": "a step failed", "exception": problem})
        await self._thread.run(self._begin)

    def _begin(self) -> None:
        """A session without completions; in the model's thread."""
        self._stack.close()
        self._owners, self._counts = {}, (0, 0)
        self._session = self._stack.enter_context(
            self._engine.session(admitted_tokens=_ADMITTED_TOKENS, spares_others=True)
        )

    def _turn(
        self, joining: Sequence[Ticket], leaving: Sequence[Ticket]
    ) -> list[tuple[Ticket, TokenDelta | list[Completion] | ApiError]]:
        """One step, and what it has for whom; in the model's thread."""
        session = self._session
        assert session is not None
        news: list[tuple[Ticket, TokenDelta | list[Completion] | ApiError]] = []
        for ticket in leaving:
            self._cancel(ticket, session)
        for ticket in joining:
            if ticket.has_left:
                continue
            try:
                ticket.handles = session.add(ticket.prompts, ticket.settings, n=ticket.n, watch_text=ticket.streams)
            except (UserError, ValueError, ArithmeticError, TypeError) as problem:
                # Its own fault, before it has a row: the others decode on.
                news.append((ticket, ApiError(400, str(problem).splitlines()[0], code="invalid_value")))
                continue
            self._owners.update(dict.fromkeys(ticket.handles, ticket))
        for running in session.step():
            owner = self._owners.get(running)
            if owner is None:
                # Another completion of its request failed in this step.
                continue
            if running.finish_reason == "failed":
                self._cancel(owner, session)
                news.append((owner, _no_token()))
                continue
            if owner.streams:
                news.append((owner, running.delta()))
            if running.finish_reason is not None:
                self._owners.pop(running, None)
                if not owner.streams and _is_done(owner):
                    news.append((owner, [each.completion() for each in owner.handles]))
        self._counts = (session.num_active, session.num_waiting)
        return news

    def _cancel(self, ticket: Ticket, session: Scheduler) -> None:
        for running in ticket.handles:
            session.cancel(running)
            self._owners.pop(running, None)

    def _fail(self, error: ApiError) -> None:
        for ticket in self._live:
            ticket.deliver(error)
        self._live, self._joining, self._leaving = set(), [], []

    def _ended(self, pump: asyncio.Task[None]) -> None:
        """Nobody waits for a loop that has ended, whyever it has."""
        self._fail(stopping())
        if not pump.cancelled() and (problem := pump.exception()) is not None:
            pump.get_loop().call_exception_handler({"message": "the decoder ended", "exception": problem})


def _is_done(ticket: Ticket) -> bool:
    return bool(ticket.handles) and all(running.finish_reason is not None for running in ticket.handles)


def _no_token() -> ApiError:
    return ApiError(
        500,
        "the model has no finite probability for any token under these settings; expected milder ones",
        code="no_token",
    )


def queue_full(waiting: int) -> ApiError:
    return ApiError(
        429,
        f"too many requests: {waiting} wait already; try again later",
        code="queue_full",
        headers={"Retry-After": "1"},
    )
