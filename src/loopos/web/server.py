"""`loopos ui` from the socket to the end: the app behind its shield on the server of `loopos serve`.

Apart from `application`: tests and other programs use that without a socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from loopos.serving.limits import ServingLimits
from loopos.serving.server import ConnectionLimit, most_descriptors, run_server
from loopos.web.application import application
from loopos.web.page import Context
from loopos.web.security import Access, RateLimit, Shield, hosts_of

LIMITS = ServingLimits(max_body=1 << 18, max_seconds=30.0, max_connections=128, grace_seconds=0.2)
"""Of connections, bodies and slow clients. Streams end at once when the app stops."""
# A page with ten runs loads some hundred curves at once, and a person never does so twice a second.
_REQUESTS = (60.0, 600.0)
_WRONG_TOKENS = (0.5, 20.0)


def shield(context: Context, *, token: str, host: str, port: int) -> Shield:
    """The whole app."""
    hosts, any_address = hosts_of(host)
    access = Access(token=token, cookie=f"loopos_ui_{port}", hosts=hosts, any_address=any_address)
    return Shield(application(context), access, rate=RateLimit(*_REQUESTS), wrong_tokens=RateLimit(*_WRONG_TOKENS))


def run(
    root: Path,
    bound: socket.socket,
    *,
    token: str,
    host: str,
    cache: Path | None,
    began: Callable[[Callable[[], None]], None],
) -> None:
    """Serves `root` until a signal. began: called when requests are accepted, with a function that does what a signal
    does.
    """
    context = Context(root=root.resolve(), cache=cache)

    async def end() -> None:
        context.closing.set()

    app = shield(context, token=token, host=host, port=bound.getsockname()[1])
    limit = ConnectionLimit(min(LIMITS.max_connections, most_descriptors()))
    run_server(app, bound, LIMITS, limit, end=end, began=began)
