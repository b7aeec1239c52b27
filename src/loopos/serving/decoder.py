"""The model's thread, and the completions that it decodes while requests come and go.

One thread runs the model; the event loop hands it one step after another. So the event loop never waits for a matrix
product, and the model needs no lock.
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
from loopos.generation.settings import SamplingParams
from loopos.serving.errors import ApiError, stopping
from loopos.serving.limits import ServingLimits

Result = TypeVar("Result")
# Maximum prompt tokens that one step prefills before rows that decode get their turn.
_ADMITTED_TOKENS = 2048


class PendingRequest:
    """Completions that a request waits for. `overflowed`: the client lags further behind than allowed."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingParams],
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
        """Number of completions of all prompts."""
        return len(self.prompts) * self.n

    def deliver(self, event: TokenDelta | list[Completion] | ApiError) -> None:
        """Queues an event for the request."""
        self._events.append(event)
        self._arrived.set()
        if len(self._events) > self._max_lag:
            self.overflowed.set()

    async def deltas(self) -> AsyncIterator[TokenDelta]:
        """The tokens of all completions as they arrive. Raises `ApiError` if the model failed."""
        ended = 0
        while ended < self.count:
            delta = await self._next()
            assert isinstance(delta, TokenDelta)
            ended += delta.finish_reason is not None
            yield delta

    async def completions(self) -> list[Completion]:
        """All completions, in the order of `Engine.generate`. Raises `ApiError` if the model failed."""
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
    """One thread for everything that runs the model, in the order of the calls."""

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.num_calls = 0

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What a function returns or raises; the event loop keeps running."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The same for a request. Raises `ApiError` (429) if too many calls wait."""
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
    """Decodes the completions of many requests in the rows of one engine, until `close`."""

    def __init__(self, engine: Engine, thread: ModelThread, limits: ServingLimits) -> None:
        self._engine, self._thread, self._limits = engine, thread, limits
        self._stack = ExitStack()
        self._scheduler: Scheduler | None = None
        self._pump: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._joining: list[PendingRequest] = []
        self._leaving: list[PendingRequest] = []
        self._owners: dict[Running, PendingRequest] = {}
        self._live: set[PendingRequest] = set()
        self._counts = (0, 0)

    async def open(self) -> None:
        """Prepares the model for generation and starts to take requests."""
        await self._thread.run(self._begin)
        self._pump = asyncio.create_task(self._run())
        self._pump.add_done_callback(self._ended)

    async def end(self) -> None:
        """Takes no more requests; those still waiting get an `ApiError`."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    async def close(self) -> None:
        """Ends, and restores the model."""
        await self.end()
        await self._thread.run(self._stack.close)

    @property
    def is_ready(self) -> bool:
        return self._pump is not None and not self._pump.done()

    @property
    def num_active(self) -> int:
        """Number of rows that decode."""
        return self._counts[0]

    @property
    def num_waiting(self) -> int:
        """Number of completions without a row."""
        return self._counts[1] + sum(request.count for request in self._joining)

    def submit(self, request: PendingRequest) -> None:
        """Takes a request. Raises `ApiError`: 429 if too many completions wait, 503 if the decoder has stopped."""
        if not self.is_ready:
            raise stopping()
        room = self._limits.max_rows + self._limits.max_queue - sum(each.count for each in self._live)
        if request.count > room:
            raise queue_full(self._limits.max_queue)
        self._live.add(request)
        self._joining.append(request)
        self._wake.set()

    def leave(self, request: PendingRequest) -> None:
        """Frees the rows of a request. A finished one stays as it is."""
        if request in self._live:
            self._live.discard(request)
            request.has_left = True
            self._leaving.append(request)
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
            events = turn.result()
            for request, event in events:
                if not request.has_left:
                    request.deliver(event)
            self._live -= {request for request in self._live if _is_done(request)}

    async def _after_failure(self, problem: BaseException) -> None:
        """Answers the decoding requests with an error, and starts anew, so that the next request is served."""
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        self._fail(ApiError(500, f"the model failed: {first}", code="model_failed"))
        if not isinstance(problem, RuntimeError | MemoryError | UserError):
            # A bug: its traceback goes to the server's log.
            asyncio.get_running_loop().call_exception_handler({"message": "a step failed", "exception": problem})
        await self._thread.run(self._begin)

    def _begin(self) -> None:
        """Opens a scheduler without completions; in the model's thread."""
        self._stack.close()
        self._owners, self._counts = {}, (0, 0)
        self._scheduler = self._stack.enter_context(
            self._engine.session(admitted_tokens=_ADMITTED_TOKENS, spares_others=True)
        )

    def _turn(
        self, joining: Sequence[PendingRequest], leaving: Sequence[PendingRequest]
    ) -> list[tuple[PendingRequest, TokenDelta | list[Completion] | ApiError]]:
        """One step and its events by request; in the model's thread."""
        session = self._scheduler
        assert session is not None
        events: list[tuple[PendingRequest, TokenDelta | list[Completion] | ApiError]] = []
        for request in leaving:
            self._cancel(request, session)
        for request in joining:
            if request.has_left:
                continue
            try:
                request.handles = session.add(
                    request.prompts, request.settings, n=request.n, watch_text=request.streams
                )
            except (UserError, ValueError, ArithmeticError, TypeError) as problem:
                # The request is invalid and has no row yet: the others continue.
                events.append((request, ApiError(400, str(problem).splitlines()[0], code="invalid_value")))
                continue
            self._owners.update(dict.fromkeys(request.handles, request))
        for running in session.step():
            owner = self._owners.get(running)
            if owner is None:
                # Another completion of its request failed in this step.
                continue
            if running.finish_reason == "failed":
                self._cancel(owner, session)
                events.append((owner, _no_token()))
                continue
            if owner.streams:
                events.append((owner, running.delta()))
            if running.finish_reason is not None:
                self._owners.pop(running, None)
                if not owner.streams and _is_done(owner):
                    events.append((owner, [each.completion() for each in owner.handles]))
        self._counts = (session.num_active, session.num_waiting)
        return events

    def _cancel(self, request: PendingRequest, session: Scheduler) -> None:
        for running in request.handles:
            session.cancel(running)
            self._owners.pop(running, None)

    def _fail(self, error: ApiError) -> None:
        for request in self._live:
            request.deliver(error)
        self._live, self._joining, self._leaving = set(), [], []

    def _ended(self, pump: asyncio.Task[None]) -> None:
        """Fails all requests, whatever ended the loop, so that none waits forever."""
        self._fail(stopping())
        if not pump.cancelled() and (problem := pump.exception()) is not None:
            pump.get_loop().call_exception_handler({"message": "the decoder ended", "exception": problem})


def _is_done(request: PendingRequest) -> bool:
    return bool(request.handles) and all(running.finish_reason is not None for running in request.handles)


def _no_token() -> ApiError:
    return ApiError(
        500,
        "the model has no finite probability for any token under these settings; use less extreme ones",
        code="no_token",
    )


def queue_full(waiting: int) -> ApiError:
    return ApiError(
        429,
        f"too many requests: {waiting} are waiting already; try again later",
        code="queue_full",
        headers={"Retry-After": "1"},
    )
