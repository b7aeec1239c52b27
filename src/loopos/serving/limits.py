"""Limits of a server, and where it may listen. Imports neither torch nor starlette, so that mistakes show at once."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from loopos.config.diagnostics import UserError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """`max_rows`: completions decoded together. `max_context`: tokens of a prompt and its completion. `max_tokens`: new
    tokens of one completion. `max_queue`: waiting completions, or waiting calls of a head. `max_body`: bytes of a
    request. `max_messages`: messages of a request. `max_seconds`: from the first byte of a request to the last of its
    response. `max_lag`: tokens that a streaming client may lag. `max_connections`: open connections; others wait.
    `header_seconds`: from the start of a connection, or the first byte of a later request, to the end of its header.
    `idle_seconds`: a connection between two requests. `grace_seconds`: time for running requests at shutdown.
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
        """Values out of range, by option name."""
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
    """Why a server must not listen on this address."""
    diagnostics = [] if 0 <= port <= 65535 else [f"--port: got {port}; expected 0 (any free one) to 65535"]
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        diagnostics.append("--api-key: got a blank or non-ASCII key; expected ASCII letters, digits and punctuation")
    elif api_key is None and not is_loopback(host):
        diagnostics.append(
            f"--host: got {host}, which other machines can reach, without an API key; set LOOPOS_API_KEY "
            "(or --api-key), or use --host 127.0.0.1"
        )
    return diagnostics


def check_rows(requested: int, limits: ServingLimits) -> None:
    """Raises `UserError` for more completions in one request than the server can ever take."""
    most = limits.max_rows + limits.max_queue
    if requested > most:
        raise UserError(f"{requested} completions in one request; this server takes at most {most}")
