"""What a server takes on at most, and where it may listen.

Enters: numbers, a host and a key from the command line. Leaves: `ServingLimits`, checked. Imports neither torch nor
starlette, so that faults come at once. Left out: enforcing them (`http.py`, `decoder.py`).
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from loopos.config.diagnostics import UserError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """`max_rows`: completions that decode together. `max_context`: tokens of a prompt and its completion. `max_tokens`:
    new tokens of one completion. `max_queue`: completions, or calls of a head, that wait. `max_body`: bytes of a
    request. `max_messages`: messages of a request. `max_seconds`: a request from its first byte to the last of its
    answer. `max_lag`: tokens that a reader of a stream may be behind. `max_connections`: open ones; others wait.
    `header_seconds`: from the begin of a connection, or the first byte of a later request, to the end of its header.
    `idle_seconds`: a connection between two requests. `grace_seconds`: what running requests get when the server is to
    stop.
    """

    max_rows: int = 16
    max_context: int = 4096
    max_tokens: int = 1024
    max_queue: int = 128
    max_body: int = 1 << 20
    max_messages: int = 1024
    max_seconds: float = 300.0
    max_lag: int = 1024
    max_connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: float = 30.0
    grace_seconds: float = 30.0

    def diagnostics(self) -> list[str]:
        """What is out of its range, by the option's name."""
        ranges = (
            ("--max-rows", self.max_rows, 1 <= self.max_rows <= _MOST_ROWS, f"1 to {_MOST_ROWS}"),
            ("--max-context", self.max_context, self.max_context >= 2, "2 or more"),
            ("--max-tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("--max-queue", self.max_queue, self.max_queue >= 0, "0 or more"),
            ("--max-body", self.max_body, self.max_body >= 1, "1 or more bytes"),
            ("--max-messages", self.max_messages, self.max_messages >= 1, "1 or more"),
            ("--max-seconds", self.max_seconds, 0 < self.max_seconds < math.inf, "a number above 0"),
            ("--max-lag", self.max_lag, self.max_lag >= 1, "1 or more"),
            ("--max-connections", self.max_connections, self.max_connections >= 1, "1 or more"),
            ("--header-seconds", self.header_seconds, 0 < self.header_seconds < math.inf, "a number above 0"),
            ("--idle-seconds", self.idle_seconds, 0 < self.idle_seconds < math.inf, "a number above 0"),
            ("--grace-seconds", self.grace_seconds, 0 <= self.grace_seconds < math.inf, "0 or more"),
        )
        return [f"{name}: got {got}; expected {expected}" for name, got, holds, expected in ranges if not holds]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_diagnostics(host: str, port: int, api_key: str | None) -> list[str]:
    """Why a server must not listen there."""
    diagnostics = [] if 0 <= port <= 65535 else [f"--port: got {port}; expected 0 (any free one) to 65535"]
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        diagnostics.append("--api-key: got a blank key, or one that is not ASCII; expected letters, digits and marks")
    elif api_key is None and not is_loopback(host):
        diagnostics.append(
            f"--host: got {host}, which other machines can reach, without an API key; expected one in LOOPOS_API_KEY "
            "(or --api-key), or --host 127.0.0.1"
        )
    return diagnostics


def check_rows(asked: int, limits: ServingLimits) -> None:
    """Raises `UserError` for more completions in one request than can ever be taken."""
    most = limits.max_rows + limits.max_queue
    if asked > most:
        raise UserError(f"{asked} completions in one request; this server takes at most {most}")
