"""Who may use the app: the token and its cookie, the Host and Origin of each request, rates, and headers of responses.

The app acts for its user, so no other web page may: a page elsewhere in the same browser can send requests here, and
with a DNS name of its own that it points to this machine (DNS rebinding) it could read the responses. So every request
needs a Host that is this machine and the token, and every write an Origin that is the app's own. `Shield` is the
outermost layer; the functions below decide and know no server. References: OWASP Cross-Site Request Forgery
Prevention; W3C Fetch Metadata; RFC 6265bis (SameSite).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loopos.config.diagnostics import UserError
from loopos.serving.errors import ApiError, stopping
from loopos.serving.http import error_response
from loopos.serving.limits import LOOPBACK_NAMES, is_loopback

READS = ("GET", "HEAD")
_METHODS = (*READS, "POST")
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""On every response. `Cache-Control` only where the response has none of its own."""
# A token that a person chooses for --host must not be guessed.
SHORTEST_TOKEN = 16
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~")
_MOST_CLIENTS = 1024


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a request must have. hosts: names that this server is called by. cookie: the name of its cookie, which has
    the port, because browsers send the cookies of a host to all its ports.
    """

    token: str
    cookie: str
    hosts: frozenset[str]
    any_address: bool = False

    def refusal(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
        """Why a request is refused; None if it is not. `open_link` decides about a link with the token."""
        if method not in _METHODS:
            return ApiError(405, f"{method}: not allowed", headers={"Allow": ", ".join(_METHODS)})
        if (problem := self._of_host(headers)) is not None:
            return problem
        if (problem := self._of_site(method, path, headers)) is not None:
            return problem
        if not self.has_token(headers):
            return ApiError(401, "no access: open the link that loopos ui printed", code="no_token")
        return None

    def has_token(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request has the token, in its cookie or as `Authorization: Bearer TOKEN`."""
        bearer = [value for value in _values(headers, b"authorization") if value.lower().startswith("bearer ")]
        found = [*(value[7:].strip() for value in bearer), *_cookies(headers, self.cookie)]
        return any(self.is_token(each) for each in found)

    def is_token(self, text: str) -> bool:
        """Whether this is the token; takes as long for every text of the same length."""
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    def open_link(self, query: bytes) -> bool:
        """Whether a request for the page has the right token in its query."""
        pairs = parse_qsl(query.decode("latin-1"), max_num_fields=16) if query.count(b"&") < 16 else []
        return any(name == "token" and self.is_token(value) for name, value in pairs)

    def set_cookie(self) -> str:
        """The header that gives a browser the token, for this session of the browser and this site only."""
        return f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"

    def _of_host(self, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
        hosts = _values(headers, b"host")
        if len(hosts) != 1:
            return ApiError(400, "expected one Host header", code="bad_host")
        name = host_name(hosts[0])
        if name is None or not (name in self.hosts or (self.any_address and _is_address(name))):
            return ApiError(403, f"host {hosts[0][:100]!r}: this server is not called so", code="bad_host")
        return None

    def _of_site(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
        """Refuses what another site has sent, by Sec-Fetch-Site, and by Origin where there is one or must be."""
        refused = ApiError(403, "the request was not sent by this app's own page", code="cross_site")
        sites, origins = _values(headers, b"sec-fetch-site"), _values(headers, b"origin")
        is_write = method not in READS
        is_navigation = not is_write and path == "/" and _values(headers, b"sec-fetch-mode") == ["navigate"]
        if len(sites) > 1 or len(origins) > 1:
            return refused
        if sites and sites[0] != "same-origin" and not (is_navigation or (sites[0] == "none" and not is_write)):
            return refused
        if origins:
            return None if _is_own(origins[0], _values(headers, b"host")[0]) else refused
        # Browsers send an Origin with every POST; a program that has the token in a header is no browser.
        if is_write and not _values(headers, b"authorization"):
            return refused
        return None


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is not a plain `name` or `name:port`."""
    if not host or len(host) > 255 or any(letter in host for letter in "@/\\?# \t%") or not host.isascii():
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if host.endswith(":"):
        return None
    return parts.hostname


def _is_own(origin: str, host: str) -> bool:
    """Whether an Origin is the address by which this request came, its port included."""
    scheme, separator, rest = origin.partition("://")
    return scheme in ("http", "https") and bool(separator) and rest.lower() == host.lower()


def _is_address(name: str) -> bool:
    """Whether a host is an IP address: a DNS name that is rebound to this machine never is."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key.lower() == name]


def _cookies(headers: Sequence[tuple[bytes, bytes]], name: str) -> list[str]:
    found = []
    for line in _values(headers, b"cookie"):
        for part in line.split(";"):
            key, _, value = part.strip().partition("=")
            if key == name:
                found.append(value)
    return found


def hosts_of(host: str) -> tuple[frozenset[str], bool]:
    """The names of a server that listens on `host`, and whether any IP address is one."""
    if is_loopback(host):
        return LOOPBACK_NAMES, False
    named = frozenset({host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()})
    return LOOPBACK_NAMES | named, True


def token_problems(token: str | None, host: str) -> list[str]:
    """What is wrong with --token and --host together."""
    if token is None:
        if is_loopback(host):
            return []
        return [
            f"--host: got {host}, which other machines can reach, without --token; set LOOPOS_UI_TOKEN, or use "
            "--host 127.0.0.1"
        ]
    if len(token) < SHORTEST_TOKEN or not set(token) <= _LETTERS:
        return [f"--token: expected at least {SHORTEST_TOKEN} letters, digits, '-', '_', '.' or '~'"]
    return []


def stored_token(folder: Path) -> str:
    """The token of this user, made at the first start, so that an open page works after the app restarts. Only the user
    can read its file. Raises `UserError`.
    """
    file = folder / "ui-token"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+") as opened:
            os.fchmod(opened.fileno(), 0o600)
            found = opened.read().strip()
            if len(found) >= SHORTEST_TOKEN and set(found) <= _LETTERS:
                return found
            made = secrets.token_urlsafe(32)
            opened.seek(0)
            opened.truncate()
            opened.write(made + "\n")
            return made
    except OSError as problem:
        raise UserError(f"{file}: {problem.strerror}; set --token, or make the folder writable") from problem


def state_folder() -> Path:
    """`loopos` in the user's folder of program state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "loopos"


@dataclass
class RateLimit:
    """A bucket of tokens per client: `burst` at once, refilled by `rate` a second."""

    rate: float
    burst: float
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def allows(self, client: str, now: float, cost: float = 1.0) -> bool:
        """Whether a client may do something now (seconds of any clock), which then counts."""
        left, since = self._left.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        allowed = left >= cost
        self._left[client] = (left - cost if allowed else left, now)
        while len(self._left) > _MOST_CLIENTS:
            self._left.popitem(last=False)
        return allowed


class Shield:
    """The outermost layer: refuses what `Access` refuses and what comes too fast, adds the headers, and counts what
    runs. A page opened with the token in its link gets the cookie.
    """

    def __init__(self, app: ASGIApp, access: Access, *, rate: RateLimit, wrong_tokens: RateLimit) -> None:
        self._app, self._access, self._rate, self._wrong = app, access, rate, wrong_tokens
        self.num_running, self.is_stopping = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal, gets_cookie = self._decide(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._headers(message["headers"], gets_cookie=gets_cookie)}
            await send(message)

        self.num_running += 1
        try:
            app: ASGIApp = self._app if refusal is None else error_response(refusal)
            await app(scope, receive, with_headers)
        finally:
            self.num_running -= 1

    def _decide(self, scope: Scope) -> tuple[ApiError | None, bool]:
        if self.is_stopping:
            return stopping(), False
        now = asyncio.get_running_loop().time()
        client = (scope.get("client") or ("",))[0]
        if not self._rate.allows(client, now):
            return ApiError(429, "too many requests", headers={"Retry-After": "1"}), False
        refusal = self._access.refusal(scope["method"], scope["path"], scope["headers"])
        if refusal is None or refusal.code != "no_token":
            return refusal, False
        is_link = scope["path"] == "/" and scope["method"] in READS
        if is_link and self._access.open_link(scope["query_string"]):
            return None, True
        if not self._wrong.allows(client, now):
            return ApiError(429, "too many requests without the token", headers={"Retry-After": "10"}), False
        return refusal, False

    def _headers(self, headers: Iterable[tuple[bytes, bytes]], *, gets_cookie: bool) -> list[tuple[bytes, bytes]]:
        found = list(headers)
        present = {name.lower() for name, _ in found}
        added = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
        found += [(name, value) for name, value in added.items() if name not in present]
        if gets_cookie:
            found.append((b"set-cookie", self._access.set_cookie().encode()))
        return found


def inside(root: Path, path: Path) -> bool:
    """Whether a path leads into `root`, with all symbolic links followed; `root` is resolved."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False
