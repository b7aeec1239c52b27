"""Who may use the app: table-driven forms of Host, Origin, fetch metadata and tokens, path traversals, limits."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import urllib.parse
from pathlib import Path

import pytest
from board_client import HOST, ORIGIN, TOKEN, Client, opened, running
from run_files import finished_run
from starlette.testclient import TestClient

from loopos.config.diagnostics import UserError
from loopos.web.board_runs import run_id
from loopos.web.security import (
    CONTENT_SECURITY_POLICY,
    HEADERS,
    Access,
    RateLimit,
    hosts_of,
    inside,
    stored_token,
    token_problems,
)

COOKIE = {"cookie": f"loopos_ui_8000={TOKEN}"}
LOOPBACK = Access(token=TOKEN, cookie="loopos_ui_8000", hosts=hosts_of("127.0.0.1")[0])
PUBLIC = Access(token=TOKEN, cookie="loopos_ui_8000", hosts=frozenset({"gpu1.lab"}), any_address=True)
SAME = {"sec-fetch-site": "same-origin"}


def status(headers: dict[str, str], method: str = "GET", *, path: str = "/api/x", access: Access = LOOPBACK) -> int:
    """The status of a refusal; 200 if there is none."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    refusal = access.refusal(method, path, raw)
    return 200 if refusal is None else refusal.status


GOOD_HOSTS = ["127.0.0.1", "127.0.0.1:8000", "localhost", "localhost:9000", "LOCALHOST:1", "[::1]", "[::1]:8000"]
# Names that resolve to this machine by an attacker's DNS, and forms that parsers read differently.
BAD_HOSTS = [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "rebind.network:8000",
    "127.0.0.1.nip.io", "localtest.me", "evil.example@127.0.0.1", "127.0.0.1@evil.example", "127.0.0.1/evil",
    "127.0.0.1#evil", "127.0.0.1?x", "127.0.0.1\\evil", "127.0.0.1 evil", "", ":8000", "0.0.0.0", "127.1", "0x7f000001",
    "2130706433", "[::]", "[::ffff:127.0.0.1]", "169.254.169.254", "192.168.0.1", "localhost.", "127.0.0.1:", "localhost:x",
    "127.0.0.1:99999", "%6cocalhost", "lo\u00e7alhost", "a" * 300,
]  # fmt: skip


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_names_of_this_machine(host: str) -> None:
    assert status({**COOKIE, "host": host}) == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_other_names_are_refused_whatever_the_token(host: str) -> None:
    assert status({**COOKIE, "host": host}) == 403
    assert status({**COOKIE, "host": host, "origin": f"http://{host}", **SAME}, "POST") == 403


def test_exactly_one_host() -> None:
    cookie = (b"cookie", COOKIE["cookie"].encode())
    for hosts in ([], [b"127.0.0.1", b"evil.example"], [b"127.0.0.1", b"127.0.0.1"]):
        refusal = LOOPBACK.refusal("GET", "/", [cookie, *((b"host", host) for host in hosts)])
        assert refusal is not None
        assert refusal.status == 400


@pytest.mark.parametrize(
    ("host", "expected"),
    [("gpu1.lab:80", 200), ("10.0.0.7:8000", 200), ("[fe80::1]", 200), ("evil.example", 403), ("localhost", 403)],
)
def test_a_public_server_answers_to_its_name_and_to_addresses(host: str, expected: int) -> None:
    """A page that rebinds its DNS name has that name in Host, never an address."""
    assert status({**COOKIE, "host": host}, access=PUBLIC) == expected


BAD_ORIGINS = [
    "null", "", "http://evil.example", "https://evil.example", "http://127.0.0.1:8001", "http://127.0.0.1",
    "http://localhost:8000", "http://127.0.0.1:8000.evil.example", "http://evil.example:8000", "http://127.0.0.1:80000",
    "http://127.0.0.1:8000@evil.example", "http://evil.example/127.0.0.1:8000", "http://127.0.0.1:8000/", "file://",
    "chrome-extension://abc", "ftp://127.0.0.1:8000", "//127.0.0.1:8000", "127.0.0.1:8000", "http:127.0.0.1:8000",
    "http://127.0.0.1:8000 http://evil.example", "javascript:alert(1)", "data:text/html,x",
]  # fmt: skip


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_origins_are_refused(origin: str, method: str) -> None:
    assert status({**COOKIE, "host": HOST, "origin": origin}, method) == 403


@pytest.mark.parametrize(
    ("headers", "method", "expected"),
    [
        ({"origin": ORIGIN, **SAME}, "POST", 200),
        ({"origin": ORIGIN}, "POST", 200),
        ({"origin": "http://127.0.0.1:8000".upper().replace("HTTP", "http")}, "POST", 200),
        ({}, "POST", 403),
        (SAME, "POST", 403),
        ({"origin": ORIGIN, "sec-fetch-site": "cross-site"}, "POST", 403),
        ({"origin": ORIGIN, "sec-fetch-site": "same-site"}, "POST", 403),
        ({"origin": ORIGIN, "sec-fetch-site": "none"}, "POST", 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "POST", 403),
        ({}, "GET", 200),
        (SAME, "GET", 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, "GET", 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, "GET", 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, "GET", 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "GET", 403),
        ({"sec-fetch-site": "Same-Origin"}, "GET", 403),
        ({}, "PUT", 405),
        ({}, "DELETE", 405),
        ({}, "OPTIONS", 405),
        ({}, "TRACE", 405),
        ({}, "CONNECT", 405),
        ({}, "get", 405),
    ],
)
def test_fetch_metadata_and_methods(headers: dict[str, str], method: str, expected: int) -> None:
    assert status({**COOKIE, "host": HOST, **headers}, method) == expected


def test_a_link_elsewhere_may_open_the_page_only() -> None:
    link = {"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", **COOKIE}
    assert status(link, path="/") == 200
    assert status(link, path="/api/board/runs") == 403
    assert status({**link, "sec-fetch-mode": "no-cors"}, path="/") == 403


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"cookie": f"loopos_ui_8000={TOKEN}"}, 200),
        ({"cookie": f"a=b; loopos_ui_8000={TOKEN}; c=d"}, 200),
        ({"cookie": f"loopos_ui_8001={TOKEN}"}, 401),
        ({"cookie": f"xloopos_ui_8000={TOKEN}"}, 401),
        ({"cookie": "loopos_ui_8000="}, 401),
        ({"cookie": f"loopos_ui_8000={TOKEN}x"}, 401),
        ({"cookie": f"loopos_ui_8000={TOKEN[:-1]}"}, 401),
        ({"cookie": "loopos_ui_8000=\xe9\xff"}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": f"bearer {TOKEN}"}, 200),
        ({"authorization": f"Basic {TOKEN}"}, 401),
        ({"authorization": TOKEN}, 401),
        ({"authorization": "Bearer "}, 401),
    ],
)
def test_tokens(headers: dict[str, str], expected: int) -> None:
    assert status({"host": HOST, **headers}) == expected


def test_a_program_with_the_token_may_write_without_an_origin() -> None:
    assert status({"host": HOST, "authorization": f"Bearer {TOKEN}"}, "POST") == 200
    assert status({"host": HOST, "authorization": "Bearer wrong", **COOKIE}, "POST") == 200
    assert status({"host": HOST, "authorization": f"Bearer {TOKEN}", "origin": "http://evil.example"}, "POST") == 403


def test_the_link_gives_the_cookie(root: Path) -> None:
    with opened(root) as page:
        client = TestClient(page.client.app, base_url=ORIGIN)
        assert client.get("/").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get(f"/api/session?token={TOKEN}").status_code == 401, "only the page takes it"
        response = client.get(f"/?token={TOKEN}")
        assert response.status_code == 200
        assert response.headers["set-cookie"] == f"loopos_ui_8000={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
        assert TOKEN not in response.text
        assert client.get("/api/session").status_code == 200


def test_every_response_has_the_headers(page: Client) -> None:
    for path in ("/", "/static/app.js", "/api/session", "/nothing", "/api/board/run/none"):
        headers = page.client.get(path).headers
        assert all(headers[name] == value for name, value in HEADERS.items() if name != "Cache-Control")
        assert headers["cache-control"] == ("no-cache" if path in ("/", "/static/app.js") else "no-store")
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    refused = page.client.get("/", headers={"host": "evil.example"})
    assert refused.headers["content-security-policy"] == CONTENT_SECURITY_POLICY


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):  # an iterator of a client
    """The app over a folder with one run, beside a file that is none of its business."""
    folder = tmp_path_factory.mktemp("security")
    finished_run(folder / "outputs" / "run")
    (folder / "secret.txt").write_text("a-secret-of-the-machine")
    with opened(folder / "outputs") as client:
        client.run("run")
        yield client


STEPS = ["..", "%2e%2e", "%2e.", ".%2e", "..%00", "....", "%252e%252e", "..;", "%c0%ae%c0%ae", "\uff0e\uff0e"]
SEPARATORS = ["/", "%2f", "%5c", "\\", "%252f"]
TARGETS = ["secret.txt", "etc/passwd"]
WHERE = ["/static/", "/api/board/run/", "/"]
TRAVERSALS = [
    f"{where}{separator.join([step] * depth)}{separator}{target}"
    for where, step, separator, target, depth in itertools.product(WHERE, STEPS, SEPARATORS, TARGETS, [3])
] + ["/static//etc/passwd", "/static/file:///etc/passwd", "/etc/passwd", "//etc/passwd", "/static/C:\\boot.ini"]


def test_path_traversals_reach_nothing(page: Client) -> None:
    """Paths are keys of tables; none is opened. Sent as raw bytes, as a client would that normalizes nothing."""
    assert len(TRAVERSALS) >= 300
    for path in TRAVERSALS:
        raw = path if path.isascii() else urllib.parse.quote(path, safe="/%\\")
        response = page.client.get(ORIGIN + raw)
        assert response.status_code in (400, 404), path
        assert "a-secret-of-the-machine" not in response.text
        assert "root:" not in response.text


@pytest.mark.parametrize("key", ["..", "../run", "run", "run/../run", "%2e%2e", "0" * 12, "", "__proto__"])
def test_runs_are_known_by_their_id_only(page: Client, key: str) -> None:
    for part in ("", "/curves", "/samples", "/csv"):
        assert page.client.get(f"/api/board/run/{key}{part}").status_code == 404
    for part in ("note", "stop", "resume"):
        assert page.post(f"/api/board/run/{key}/{part}", {})[0] in (404, 405)


def test_links_out_of_the_folder_are_not_followed(root: Path, tmp_path: Path) -> None:
    outside = finished_run(tmp_path / "outside").folder
    (outside / "config.json").write_text('{"computation": {"method": "a-secret-of-the-machine"}}')
    (outside / "samples.jsonl").write_text('{"step": 1, "prompt": "a-secret-of-the-machine", "response": ""}\n')
    (root / "folder").symlink_to(outside)
    for name in ("events.jsonl", "config.json", "samples.jsonl"):
        run = finished_run(root / f"link-{name.partition('.')[0]}").folder
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    with opened(root) as page:
        runs = {run["name"]: run for run in (page.run(f"link-{name}") for name in ("events", "config", "samples"))}
        assert len(page.get("/api/board/runs")["runs"]) == 3, "a linked folder is not searched"
        assert runs["link-events"]["problem"] == "events.jsonl leads out of the folder"
        assert "leads out of the folder" in runs["link-config"]["problem"]
        text = str([page.get("/api/board/runs"), page.get(f"/api/board/run/{runs['link-samples']['id']}/samples")])
        assert "a-secret" not in text
        code, _ = page.refused("/api/board/settings", run=[runs["link-config"]["id"]])
        assert code == 409


def test_inside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to("loop")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert inside(tmp_path, tmp_path / "b")
    assert not inside(tmp_path / "a", tmp_path)
    assert not inside(tmp_path / "a", tmp_path / "a" / ".." / "b" / ".." / "x")
    assert not inside(tmp_path, tmp_path / "a" / "loop")
    assert not inside(tmp_path, tmp_path / "missing")


def test_bodies(page: Client) -> None:
    path = f"/api/board/run/{page.run('run')['id']}/note"
    headers = {"Origin": ORIGIN, "Content-Type": "application/json"}
    post = page.client.post
    assert post(path, content=b"x" * (10 << 20), headers=headers).status_code == 413
    assert post(path, content=iter([b"x" * (1 << 20)] * 10), headers=headers).status_code == 413
    assert post(path, content=b"{", headers=headers).status_code == 400
    assert post(path, content=b"[" * 100_000, headers=headers).status_code == 400
    assert post(path, content=b"[]", headers=headers).status_code == 400
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert post(path, content=b"{}", headers={**headers, "Content-Type": kind}).status_code == 415
    for content in ({"note": 3}, {"note": "x" * 20_001}, {"tags": "a"}, {"tags": [1]}, {"tags": ["x" * 65]}):
        assert page.post(path, content)[0] == 400


def test_rates() -> None:
    limit = RateLimit(rate=2.0, burst=3.0)
    assert [limit.allows("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.allows("b", 0.0)
    assert [limit.allows("a", 1.0) for _ in range(3)] == [True, True, False]
    for client in range(5000):
        limit.allows(str(client), 2.0)
    assert len(limit._left) <= 1024


def test_guessing_tokens_is_slow(root: Path) -> None:
    with opened(root) as page:
        client = TestClient(page.client.app, base_url=ORIGIN)
        codes = [client.get(f"/?token={guess}").status_code for guess in range(30)]
        assert codes[:20] == [401] * 20
        assert codes[-1] == 429
        assert page.get("/api/session"), "who has the token is not slowed"


def test_the_token_of_a_user(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "loopos"
    token = stored_token(folder)
    assert len(token) >= 40
    assert stored_token(folder) == token
    assert stat.S_IMODE((folder / "ui-token").stat().st_mode) == 0o600
    (folder / "ui-token").write_text("short")
    assert stored_token(folder) != token
    (folder / "ui-token").unlink()
    (folder / "ui-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="ui-token"):
        stored_token(folder)


@pytest.mark.parametrize(
    ("token", "host", "problem"),
    [
        (None, "127.0.0.1", ""),
        (None, "localhost", ""),
        (None, "::1", ""),
        (None, "0.0.0.0", "without --token"),
        (None, "192.168.0.7", "without --token"),
        ("x" * 16, "0.0.0.0", ""),
        ("x" * 15, "0.0.0.0", "at least 16"),
        ("x" * 16 + ";", "127.0.0.1", "at least 16"),
        ("x" * 16 + "\n", "127.0.0.1", "at least 16"),
    ],
)
def test_a_public_address_needs_a_token(token: str | None, host: str, problem: str) -> None:
    found = token_problems(token, host)
    assert (problem in found[0]) if problem else not found


def test_a_slow_client_does_not_hold_the_app(root: Path) -> None:
    """Half a header and half a body wait; others are served meanwhile."""
    with running(root) as link:
        address = urllib.parse.urlsplit(link)
        slow = [socket.create_connection((address.hostname, address.port)) for _ in range(20)]
        for number, each in enumerate(slow):
            each.sendall(b"GET / HT" if number % 2 else b"POST /api/board/run/x/note HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        with socket.create_connection((address.hostname, address.port)) as quick:
            quick.sendall(
                f"GET /api/session HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
            )
            assert quick.recv(1000).startswith(b"HTTP/1.1 200")
        for each in slow:
            each.close()


def test_ids_are_of_the_path_in_the_folder(tmp_path: Path) -> None:
    first, second = run_id(tmp_path, tmp_path / "a" / "b"), run_id(tmp_path, tmp_path / "a")
    assert first != second
    assert len(first) == 12
    assert run_id(tmp_path, tmp_path / os.fsdecode(b"\xff")) != first
