"""`loopos ui` from the command line: the link, refusals, its end; and a real run that is stopped and resumed by it."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from board_client import TOKEN, opened, until
from forked import Child
from pico_runs import class_rows, train
from pico_runs import config_of as pico_config
from run_files import finished_run
from typer.testing import CliRunner

from loopos.cli import ui
from loopos.cli.commands import app
from loopos.evaluation.run_folder import read_run

LINK = re.compile(r"^(\S+): (http://127\.0\.0\.1:\d+)/\?token=(\S+)$", re.MULTILINE)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["ui", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_link_works_until_a_signal(root: Path, tmp_path: Path, stop: signal.Signals) -> None:
    finished_run(root / "a")
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Child(lambda: app(["ui", str(root), "--no-open"]), state) as process:
        found = until(lambda: LINK.search(process.output) or process.poll() is not None)
        assert not isinstance(found, bool), process.errors
        assert found[3] == (tmp_path / "state" / "loopos" / "ui-token").read_text().strip()
        assert found[3] not in process.errors
        request = urllib.request.Request(f"{found[2]}/api/session", headers={"Authorization": f"Bearer {found[3]}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.loads(answer.read())["folder"] == str(root)
        # A page that follows the runs does not hold the end.
        stream = urllib.request.Request(f"{found[2]}/api/board/stream", headers={"Authorization": f"Bearer {found[3]}"})
        with urllib.request.urlopen(stream, timeout=30) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(stop)
            assert until(lambda: process.poll() is not None)
        assert process.returncode in (0, -stop)
        assert "stopped" in process.errors or process.returncode == -stop


def test_refusals(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in refused(tmp_path / "missing")
    assert "without --token" in refused(root, "--host", "0.0.0.0")
    assert "at least 16" in refused(root, "--token", "short")
    assert "--port: got 70000" in refused(root, "--port", 70000)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ui", str(root)])
    assert result.exit_code == 1
    assert "[ui]" in result.stderr


def test_the_browser_is_opened_without_the_token_in_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_links: list[str] = []
    monkeypatch.setattr(ui.webbrowser, "open", opened_links.append)
    ui._open(f"http://127.0.0.1:1/?token={TOKEN}", tmp_path / "state")
    file = tmp_path / "state" / "open.html"
    assert opened_links == [file.as_uri()]
    assert f"?token={TOKEN}" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_real_run_is_stopped_with_a_checkpoint_and_resumed(root: Path, pico_folder: Path) -> None:
    """The run of another process stops at a request, resumes at another in a process of its own, and ends as a run that
    was never stopped.
    """
    settings: dict[str, Any] = {"training": {"num_epochs": 100, "max_steps": 150, "save_every": 50}}
    config = pico_config(root / "outputs" / "real", pico_folder, class_rows(24), **settings)
    twin = pico_config(root / "outputs" / "twin", pico_folder, class_rows(24), **settings)
    with Child(lambda: sys.exit(not train(config).interrupted)) as process, opened(root) as page:
        until(lambda: page.run("outputs/real").get("step", 0) > 20)
        key = page.run("outputs/real")["id"]
        assert page.run("outputs/real")["state"] == "running"
        assert page.post(f"/api/board/run/{key}/stop", {}) == (200, {"pid": process.pid})
        until(lambda: process.poll() is not None)
        stopped = until(lambda: (run := page.run("outputs/real"))["state"] == "interrupted" and run)
        assert stopped["step"] < 150
        assert any((root / "outputs" / "real" / "checkpoints").iterdir())
        code, answer = page.post(f"/api/board/run/{key}/resume", {})
        assert code == 200, answer
        until(lambda: (found := page.get(f"/api/board/run/{key}")["process"]) and not found["is_active"])
        resumed = page.get(f"/api/board/run/{key}")
        assert resumed["process"]["status"] == 0, resumed["process"]["printed"]
        assert [mark["kind"] for mark in resumed["markers"] if mark["kind"] == "resume"] == ["resume"]
        until(lambda: page.run("outputs/real")["step"] == 150)
    train(twin)
    losses = [
        [event["metrics"]["loss"] for event in read_run(root / "outputs" / name).events if event["event"] == "step"]
        for name in ("real", "twin")
    ]
    assert losses[0] == losses[1]
