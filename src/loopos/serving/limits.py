"""Limits of a server, and where it may listen. Imports neither torch nor starlette, so that mistakes show at once."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from loopos.config.diagnostics import UserError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """What a server takes, by the help texts of the options. `max_queue` counts the waiting calls of a head too;
    `max_seconds` runs from the first byte of a request to the last of its response, `header_seconds` from the start of
    a connection, or the first byte of a later request, to the end of its header, and `idle_seconds` between two
    requests.
    """

    max_rows: int = field(default=16, metadata={"help": "Maximum completions decoded together."})
    max_context: int = field(default=4096, metadata={"help": "Maximum tokens of prompt and completion."})
    max_tokens: int = field(default=1024, metadata={"help": "Maximum new tokens per completion."})
    max_queue: int = field(default=128, metadata={"help": "Maximum waiting completions; more get status 429."})
    max_body: int = field(default=1 << 20, metadata={"help": "Maximum request size in bytes; larger gets status 413."})
    max_messages: int = field(default=1024, metadata={"help": "Maximum messages per request; more get status 400."})
    max_seconds: float = field(default=300.0, metadata={"help": "Maximum seconds per request; longer gets status 408."})
    max_lag: int = field(
        default=1024, metadata={"help": "Tokens that a streaming client may lag before it is cut off."}
    )
    max_connections: int = field(default=512, metadata={"help": "Maximum open connections; others wait."})
    header_seconds: float = field(default=10.0, metadata={"help": "Timeout for a request header (seconds)."})
    idle_seconds: float = field(default=30.0, metadata={"help": "Idle timeout of a connection (seconds)."})
    grace_seconds: float = field(default=30.0, metadata={"help": "Seconds for running requests to finish at shutdown."})

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
