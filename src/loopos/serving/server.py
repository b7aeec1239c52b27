"""A model behind HTTP, from the socket to an orderly shutdown; with limits on connections and slow headers.

Serves until a signal. Then it refuses new requests, finishes running ones within a grace period, and ends. A connection
that is slow or idle is closed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from loopos.config.diagnostics import UserError
from loopos.serving.http import Middleware, Service, application
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.storage.terminals import leave_the_terminal

# Descriptors reserved for files and libraries.
_OTHER_DESCRIPTORS = 64


class ConnectionLimit:
    """The open connections, at most `most`."""

    def __init__(self, most: int) -> None:
        self.open: set[Connection] = set()
        self._most = most
        self._has_room = asyncio.Event()

    async def wait(self) -> None:
        """Waits for room; closes idle connections to make some."""
        while len(self.open) >= self._most:
            self._has_room.clear()
            self.close_idle()
            await self._has_room.wait()

    def close_idle(self) -> None:
        for connection in [each for each in self.open if each.is_idle]:
            connection.transport.close()

    def add(self, connection: Connection) -> None:
        self.open.add(connection)

    def remove(self, connection: Connection) -> None:
        self.open.discard(connection)
        self._has_room.set()


class Connection(H11Protocol):
    """One client's connection, which the application can cut (`abort` in the scope's state). It is closed if a request
    header, the first or a later one, does not arrive in time.
    """

    def __init__(self, *, limit: ConnectionLimit, header_seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._limit, self._header_seconds = limit, header_seconds
        self._header_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it waits for another request, of which nothing has arrived."""
        return self.timeout_keep_alive_task is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit.add(self)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._time_header()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._limit.remove(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Part of the next request arrived while this one was answered.
        if self.conn.trailing_data[0]:
            self._time_header()

    def _time_header(self) -> None:
        """Runs the timer while a header is awaited, from its first byte on, however slowly the others arrive."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._header_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def most_descriptors() -> int:
    """Maximum connections that this process has descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, soft - _OTHER_DESCRIPTORS)


# A client that does not read is noticed after this many bytes in the kernel, not after the megabytes it would grow to.
_SEND_BUFFER = 1 << 16
_CONNECTIONS_WAITING = 512
# Seconds until the next try when no descriptors are left.
_NO_DESCRIPTORS = 0.5
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Seconds for the error responses of requests that the shutdown ends.
_LAST_ANSWERS = 1.0


def listening(host: str, port: int, limits: ServingLimits) -> socket.socket:
    """A socket that listens on the address. Raises `UserError` if it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host: got {host}; {error.strerror or error}; expected an address of this machine"
        ) from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    # A response that nobody reads does not keep its connection forever. Only Linux has this option.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * limits.max_seconds))
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{host}:{port}: cannot listen there ({error.strerror}); use a free port of this machine, or "
            "--port 0 for any free port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a server on a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    service: Service,
    metrics: ServingMetrics,
    bound: socket.socket,
    limits: ServingLimits,
    *,
    api_key: str | None,
    began: Callable[[Callable[[], None]], None],
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP; a second signal ends at once. began: called when requests are accepted,
    with a function that does what the signals do, for a server outside the main thread.
    """
    middleware = Middleware(application(service, limits, metrics), metrics, api_key=api_key)
    limit = ConnectionLimit(min(limits.max_connections, most_descriptors()))
    metrics.gauges["loopos_connections"] = ("Open connections.", lambda: len(limit.open))
    run_server(middleware, bound, limits, limit, end=service.end, began=began)


def run_server(
    app: Drained,
    bound: socket.socket,
    limits: ServingLimits,
    limit: ConnectionLimit,
    *,
    end: Callable[[], Awaitable[None]],
    began: Callable[[Callable[[], None]], None],
) -> None:
    """Runs any application as `serve` does. end: ends the requests that still run after the grace period."""
    config = uvicorn.Config(
        app,
        # Called with keywords, like the class that uvicorn expects.
        http=partial(Connection, limit=limit, header_seconds=limits.header_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        timeout_graceful_shutdown=1,
        backlog=_CONNECTIONS_WAITING,
    )
    _Server(config, app, end, limits, began, limit, bound).run(sockets=[bound])


class Drained(Protocol):
    """An application that counts its requests in progress, and refuses new ones when it is stopping."""

    num_running: int
    is_stopping: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class _Server(uvicorn.Server):
    """Drains between the signal and the end: running requests finish while new ones are refused."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: Drained,
        end: Callable[[], Awaitable[None]],
        limits: ServingLimits,
        began: Callable[[Callable[[], None]], None],
        limit: ConnectionLimit,
        bound: socket.socket,
    ) -> None:
        super().__init__(config)
        self._app, self._end, self._limits, self._began = app, end, limits, began
        self._limit, self._bound = limit, bound
        self._accepting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # `_accept` takes connections: asyncio's own way has no limit, and spins when descriptors run out.
        await super().startup([])
        self._loop = asyncio.get_running_loop()
        self._bound.listen(_CONNECTIONS_WAITING)
        self._bound.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        if not self.should_exit:
            self._began(lambda: self.handle_exit(signal.SIGTERM, None))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        await super().shutdown(sockets)

    async def _accept(self) -> None:
        """Accepts connections while there is room and a descriptor."""
        loop = asyncio.get_running_loop()
        was_full = False
        while True:
            await self._limit.wait()
            try:
                connection, _ = await loop.sock_accept(self._bound)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                if not was_full:
                    logging.getLogger("uvicorn.error").warning("%s: new connections wait", error.strerror)
                was_full = True
                self._limit.close_idle()
                await asyncio.sleep(_NO_DESCRIPTORS)
                continue
            was_full = False
            try:
                await loop.connect_accepted_socket(self._protocol, connection)
            except OSError:
                # Its client has disconnected already.
                connection.close()

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._app.is_stopping or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._app.is_stopping = True
        self._loop.call_soon_threadsafe(self._drain)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # A closed terminal ends the server as SIGTERM does, unless it was started to ignore that (nohup).
        hangs_up = threading.current_thread() is threading.main_thread()
        hangs_up = hangs_up and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        before = signal.signal(signal.SIGHUP, self._hang_up) if hangs_up else None
        try:
            with super().capture_signals():
                yield
        finally:
            if hangs_up:
                signal.signal(signal.SIGHUP, before)

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        leave_the_terminal()
        self.handle_exit(sig, frame)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        await self._until_none_runs(self._limits.grace_seconds)
        await self._end()
        await self._until_none_runs(_LAST_ANSWERS)
        self.should_exit = True

    async def _until_none_runs(self, seconds: float) -> None:
        last = asyncio.get_running_loop().time() + seconds
        while self._app.num_running and asyncio.get_running_loop().time() < last:
            await asyncio.sleep(0.05)
