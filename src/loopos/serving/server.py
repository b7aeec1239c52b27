"""A server's open connections: how many there may be, and how long a request's header may take.

Enters: sockets that clients opened. Leaves: requests to the application, by uvicorn's own protocol; or the end of a
connection that is slow or idle. Apart from `deploy.serve`, which takes them: what a connection may do is decided here.

A model behind HTTP, from the socket to the orderly end.

Enters: a service, limits, an address. Leaves: answers, until a signal; then no new requests, what runs is finished
within a time of grace, and the process may end. Left out: opening models and options (`cli.serve`).
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from loopos.config.diagnostics import UserError
from loopos.serving.http import Gate, Service, application
from loopos.serving.limits import ServingLimits
from loopos.serving.metrics import ServingMetrics
from loopos.storage.terminals import leave_the_terminal

# Descriptors that are left to files and libraries.
_OTHER_DESCRIPTORS = 64


class Room:
    """The open connections, at most `most`."""

    def __init__(self, most: int) -> None:
        self.open: set[Connection] = set()
        self._most = most
        self._has_room = asyncio.Event()

    async def wait(self) -> None:
        """Until there is room; connections between two requests are closed to make some."""
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
    """One client's connection, which the application can cut (`abort` in the scope's state). It is closed where a
    request's header is not there in time, be it the first or a later one.
    """

    def __init__(self, *, room: Room, header_seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._room, self._header_seconds = room, header_seconds
        self._header_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it waits for another request, of which nothing has come."""
        return self.timeout_keep_alive_task is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._room.add(self)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._time_header()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._room.remove(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # What came of the next request while this one was answered.
        if self.conn.trailing_data[0]:
            self._time_header()

    def _time_header(self) -> None:
        """Has the timer run while a header is awaited, from its first byte on, however slowly the others come."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._header_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def most_descriptors() -> int:
    """Connections that this process has descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, soft - _OTHER_DESCRIPTORS)


# A reader that does not read is noticed after so many bytes in the kernel, not after the megabytes it would grow to.
_SEND_BUFFER = 1 << 16
_CONNECTIONS_WAITING = 512
# Until the next try where there are no descriptors left: seconds.
_NO_DESCRIPTORS = 0.5
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# For the errors of what the end cuts short: seconds.
_LAST_ANSWERS = 1.0


def listening(host: str, port: int, limits: ServingLimits) -> socket.socket:
    """A socket that listens there. Raises `UserError` where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host: got {host}; {error.strerror or error}; expected an address of this machine"
        ) from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    # An answer that nobody fetches does not hold its connection for ever. Linux alone has this.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * limits.max_seconds))
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{host}:{port}: cannot listen there ({error.strerror}); expected a free port of this machine, such as "
            "--port 0 for any"
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
    """Serves until SIGTERM, SIGINT or SIGHUP; a second signal ends at once. began: called when requests are taken, with
    a function that does what the signals do, for a server that runs in another thread than the main one.
    """
    gate = Gate(application(service, limits, metrics), metrics, api_key=api_key)
    room = Room(min(limits.max_connections, most_descriptors()))
    metrics.gauges["loopos_connections"] = ("Open connections.", lambda: len(room.open))
    config = uvicorn.Config(
        gate,
        # Called with keywords, as the class that uvicorn expects is.
        http=partial(Connection, room=room, header_seconds=limits.header_seconds),  # type: ignore[arg-type]
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
    _Server(config, gate, service, limits, began, room, bound).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Between the signal and the end there is time: what runs is finished while new requests are refused."""

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        service: Service,
        limits: ServingLimits,
        began: Callable[[Callable[[], None]], None],
        room: Room,
        bound: socket.socket,
    ) -> None:
        super().__init__(config)
        self._gate, self._service, self._limits, self._began = gate, service, limits, began
        self._room, self._bound = room, bound
        self._accepting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Connections are taken by `_accept`: asyncio's own way knows no bound, and spins where descriptors run out.
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
        """Takes connections, as long as there is room for them and a descriptor."""
        loop = asyncio.get_running_loop()
        was_full = False
        while True:
            await self._room.wait()
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
                self._room.close_idle()
                await asyncio.sleep(_NO_DESCRIPTORS)
                continue
            was_full = False
            try:
                await loop.connect_accepted_socket(self._protocol, connection)
            except OSError:
                # Its client has gone already.
                connection.close()

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.is_stopping or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._gate.is_stopping = True
        self._loop.call_soon_threadsafe(self._drain)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # A terminal that is closed ends the server as SIGTERM does, unless it was started to ignore that (nohup).
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
        await self._service.end()
        await self._until_none_runs(_LAST_ANSWERS)
        self.should_exit = True

    async def _until_none_runs(self, seconds: float) -> None:
        last = asyncio.get_running_loop().time() + seconds
        while self._gate.num_running and asyncio.get_running_loop().time() < last:
            await asyncio.sleep(0.05)
