"""A server's open connections: how many there may be, and how long a request's header may take.

Enters: sockets that clients opened. Leaves: requests to the application, by uvicorn's own protocol; or the end of a
connection that is slow or idle. Apart from `deploy.serve`, which takes them: what a connection may do is decided here.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

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
