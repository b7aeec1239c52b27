"""The board through its requests: states, progress, live logs, curves, samples, settings, notes, stop and resume."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from board_client import TOKEN, opened, running, until
from forked import Child
from pico_runs import class_rows, train
from pico_runs import config_of as pico_config
from run_files import RunWriter, config_of, finished_run, policy_run, write_answers

from loopos.config.diagnostics import UserError
from loopos.evaluation.run_folder import read_run
from loopos.storage.folder_lock import LOCK, only_writer
from loopos.web import board_runs
from loopos.web.board_runs import sampled
from loopos.web.run_process import resume_command, stop

# What a browser would run if it read a text as HTML.
PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "javascript:alert(1)",
    "</title><script>alert(1)</script>", "{{7*7}}", "${alert(1)}", "'-alert(1)-'", "<iframe srcdoc='<script>'>",
    "\u202e\u0000\x1b[2J", "\ud800",
]  # fmt: skip


def test_a_finished_run(root: Path) -> None:
    finished_run(root / "project" / "a")
    with opened(root) as page:
        run = page.run("project/a")
        assert (run["state"], run["status"], run["method"]) == ("finished", "finished (max_steps)", "sft")
        assert (run["step"], run["total_steps"], run["tokens_per_second"]) == (100, 100, 111)
        assert run["headline"] == {"name": "loss", "value": 0.9, "before": 2.5}
        assert (run["best_step"], run["read"], run["problem"]) == (100, 1, "")
        assert "eta_seconds" not in run
        details = page.get(f"/api/board/run/{run['id']}")
        assert details["ended"] == "stopped at max_steps 100"
        assert [each["resumed"] for each in details["sessions"]] == [False, True]
        assert {mark["kind"] for mark in details["markers"]} == {"resume", "alert", "checkpoint", "best"}


def test_states_are_those_of_runs_list(root: Path) -> None:
    finished_run(root / "finished")
    for name, stopped_by in (("interrupted", "SIGTERM"), ("failed", "callback error")):
        run = RunWriter(root / name)
        run.session()
        run.steps(1, 3)
        run.end(3, stopped_by)
    for name in ("no_end", "killed"):
        run = RunWriter(root / name)
        run.session()
        run.close()
    (root / "killed" / LOCK).write_text(json.dumps({"pid": 1, "host": os.uname().nodename, "since": 0}))
    with only_writer(root / "finished"), opened(root) as page:
        states = {name: page.run(name)["state"] for name in ("finished", "interrupted", "failed", "no_end", "killed")}
        assert states == {name: read_run(root / name).state for name in states}
        assert states["finished"] == "running"
        assert states["killed"] == "killed"


def test_progress_of_a_running_run(root: Path) -> None:
    run = RunWriter(root / "a")
    with only_writer(run.folder), opened(root) as page:
        run.session()
        run.steps(1, 20)
        snapshot = until(lambda: (found := page.run("a"))["step"] == 20 and found["state"] == "running" and found)
        # A step a second, 80 are left.
        assert (snapshot["seconds_per_step"], snapshot["eta_seconds"]) == (1, 80)
        assert snapshot["is_local"]
        assert snapshot["memory"] > 1 << 20
        checkpoint = run.log.offset()
        run.steps(21, 25)
        until(lambda: page.run("a")["step"] == 25)
        run.log.rewind(checkpoint)
        until(lambda: page.run("a")["step"] == 20)
    run.close()


def test_new_and_removed_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_runs, "_LOOK_FOR_RUNS", 0.05)
    monkeypatch.setattr(board_runs, "_LOOK", 0.02)
    first = finished_run(root / "a")
    with opened(root) as page:
        colors = {"a": page.run("a")["color"]}
        finished_run(root / "b")
        page.run("b")
        assert page.run("a")["color"] == colors["a"], "a new run changes no color"
        assert page.run("b")["color"] != colors["a"]
        for file in first.folder.iterdir():
            file.unlink()
        until(lambda: [run["name"] for run in page.get("/api/board/runs")["runs"]] == ["b"])


def test_broken_runs_are_shown_as_such(root: Path) -> None:
    finished_run(root / "fine")
    (finished_run(root / "config").folder / "config.json").write_text("{")
    with (finished_run(root / "log").folder / "events.jsonl").open("a") as file:
        file.write("broken\n")
    run = RunWriter(root / "odd")
    run.write("session", 0, {"settings": 3, "total_steps": "many"})
    run.write("end", 0, {})
    run.close()
    with opened(root) as page:
        assert page.run("fine")["problem"] == ""
        assert "config.json: broken" in page.run("config")["problem"]
        assert "not an event" in page.run("log")["problem"]
        assert page.run("odd")["problem"]


def test_curves_of_several_metrics(root: Path) -> None:
    policy_run(root / "ppo")
    with opened(root) as page:
        run = page.run("ppo")
        path = f"/api/board/run/{run['id']}/curves"
        found = page.get(path, name=["rollout/reward", "step/clip_share", "step/none", "none/x", "x"], window=5)[
            "curves"
        ]
        assert set(found) == {"rollout/reward", "step/clip_share"}
        assert found["rollout/reward"]["n"] == 40
        rewards = [each["metrics"]["reward"] for each in read_run(root / "ppo").events if each["event"] == "rollout"]
        assert found["rollout/reward"]["smooth_y"][-1] == pytest.approx(sum(rewards[-5:]) / 5)
        assert page.refused(path, axis="space")[0] == 400
        assert page.refused(path, points="1e9")[0] == 400
        assert page.refused(path, window="nan")[0] == 400
        assert page.refused(path, low="x")[0] == 400
        assert page.get(f"/api/board/run/{run['id']}")["frontier"]["source"] == "rollout"
        assert page.client.get(f"/api/board/run/{run['id']}/csv?kind=rollout").text.count("\n") == 41
        assert page.refused(f"/api/board/run/{run['id']}/csv", kind="end")[0] == 400


def test_samples_side_by_side(root: Path) -> None:
    policy_run(root / "ppo")
    finished_run(root / "a")
    with opened(root) as page:
        path = f"/api/board/run/{page.run('ppo')['id']}/samples"
        found = page.get(path)
        assert (found["all_steps"], found["steps"], found["num_rows"]) == ([0, 40, 80], [0, 40, 80], 2)
        assert found["rows"][0]["answers"]["40"][0] == {
            "text": "answer 0 at 40",
            "reward": 0.5,
            "parts": {},
            "finish_reason": "stop",
        }
        assert page.get(path, step=["80"])["steps"] == [80]
        assert [row["prompt"] for row in page.get(path, low=0.9)["rows"]] == ["Where is my parcel?"]
        assert page.get(path, high=-1)["num_rows"] == 0
        assert page.get(path, text="answer 1")["num_rows"] == 1
        assert len(page.get(path, offset=1)["rows"]) == 1
        assert page.refused(path, file="secret")[0] == 400
        assert page.get(f"/api/board/run/{page.run('a')['id']}/samples")["num_rows"] == 0


def test_settings_that_differ(root: Path) -> None:
    finished_run(root / "a", training={"learning_rate": 1.0})
    finished_run(root / "b", training={"learning_rate": 2.0})
    secret = {"judge": {"base_url": "https://me:word@host/v1", "api_key": "sk-123", "api_key_env": "KEY"}}
    finished_run(root / "c", data=secret)
    with opened(root) as page:
        keys = [page.run(name)["id"] for name in ("a", "b", "c")]
        found = page.get("/api/board/settings", run=keys[:2])["settings"]
        assert found == {"training.learning_rate": [1.0, 2.0]}
        every = page.get("/api/board/settings", run=keys[:1])["settings"]
        assert every["training.batch_size"] == [8]
        text = json.dumps(page.get("/api/board/settings", run=keys))
        assert "sk-123" not in text
        assert "word" not in text
        assert "host/v1" in text
        assert page.refused("/api/board/settings")[0] == 400
        assert page.refused("/api/board/settings", run="none")[0] == 404


def test_notes_and_tags(root: Path) -> None:
    finished_run(root / "a")
    with opened(root) as page:
        path = f"/api/board/run/{page.run('a')['id']}/note"
        code, run = page.post(path, {"note": "good\nrun", "tags": ["x", " y ", "x", ""]})
        assert (code, run["note"], run["tags"]) == (200, "good\nrun", ["x", "y"])
    assert json.loads((root / "a.board.json").read_text()) == {"note": "good\nrun", "tags": ["x", "y"]}
    (root / "a.board.json").write_text('{"note": 3, "tags": [1, "z"]}')
    with opened(root) as page:
        assert (page.run("a")["note"], page.run("a")["tags"]) == ("", ["z"])


def test_a_run_that_is_the_folder_itself(root: Path) -> None:
    finished_run(root)
    with opened(root) as page:
        code, answer = page.post(f"/api/board/run/{page.run('outputs')['id']}/note", {"note": "x"})
        assert code == 409
        assert "open the folder above" in answer["error"]["message"]
    assert not (root.parent / "outputs.board.json").exists()


def test_texts_stay_texts(root: Path) -> None:
    """Names, notes, metrics and answers that are HTML come back as JSON, whole; no response is HTML but the page."""
    policy_run(root / "texts")
    write_answers(root / "texts", iter(PAYLOADS[:6]))
    for number, payload in enumerate(PAYLOADS[:9]):
        run = RunWriter(root / payload.replace("/", "\u2215"))
        run.session()
        run.write("step", 1, {payload: 1.0})
        run.write("alert", 1, {"name": payload, "message": payload, "value": number, "limit": 0})
        run.close()
    with opened(root) as page:
        for payload in PAYLOADS[:9]:
            found = page.run(payload.replace("/", "\u2215"))
            details = page.get(f"/api/board/run/{found['id']}")
            assert details["names"]["step"] == [payload]
            assert details["markers"][0]["text"] == payload
        key = page.run("texts")["id"]
        answers = json.dumps(page.get(f"/api/board/run/{key}/samples"))
        assert all(json.dumps(payload) in answers for payload in PAYLOADS[:6])
        for payload in PAYLOADS:
            assert page.post(f"/api/board/run/{key}/note", {"note": payload, "tags": [payload]})[0] == 200
            response = page.client.get("/api/board/runs")
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert next(run["note"] for run in response.json()["runs"] if run["id"] == key) == payload


def test_the_stream_sends_all_then_what_changed(root: Path) -> None:
    run = RunWriter(root / "a")
    run.session()
    finished_run(root / "b")

    async def follow(link: str) -> list[Any]:
        events = []
        address = link.partition("/?")[0]
        async with (
            httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20) as client,
            client.stream("GET", f"{address}/api/board/stream") as response,
        ):
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                    names = {each["name"]: each for event in events for each in event["runs"]}
                    if len(names) == 2 and names["a"]["step"] == 0:
                        run.steps(1, 5)
                    if names.get("a", {}).get("step") == 5:
                        return events
        raise AssertionError("the stream ended")

    with running(root) as link:
        events = asyncio.run(follow(link))
    assert [each["name"] for each in events[-1]["runs"]] == ["a"]
    run.close()


def test_a_long_log_is_first_shown_by_samples(root: Path) -> None:
    run = RunWriter(root / "a", total_steps=4000)
    run.session()
    run.steps(1, 4000)
    run.close()
    index = sampled(run.log.path, run.log.path.stat().st_size)
    steps = index.tables["step"].column("@step")
    assert 300 < len(steps) <= 600
    assert (steps[1:] >= steps[:-1]).all()
    assert steps[-1] > 3900
    assert index.notable[0]["event"] == "session"


def test_a_real_run(root: Path, pico_folder: Path) -> None:
    config = pico_config(root / "real", pico_folder, class_rows(24))
    result = train(config)
    with opened(root) as page:
        run = page.run("real")
        assert (run["state"], run["method"], run["step"]) == ("finished", "fine_tuning", result.step)
        details = page.get(f"/api/board/run/{run['id']}")
        assert {"loss", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(details["names"]["step"])
        found = page.get(f"/api/board/run/{run['id']}/curves", name="step/loss", axis="tokens")["curves"]["step/loss"]
        events = [each for each in read_run(root / "real").events if each["event"] == "step"]
        assert found["y"] == pytest.approx([each["metrics"]["loss"] for each in events], rel=1e-6)
        assert found["x"] == [each["metrics"]["tokens"] for each in events]


def test_stop_sends_sigterm_to_the_process_that_holds_the_lock(root: Path) -> None:
    run = finished_run(root / "a")

    def hold() -> None:
        with only_writer(run.folder):
            print("holds", flush=True)
            signal.pause()

    with pytest.raises(UserError, match="not running"):
        stop(run.folder)
    with Child(hold) as process, opened(root) as page:
        until(lambda: (run.folder / LOCK).exists() and (run.folder / LOCK).read_text())
        code, answer = page.post(f"/api/board/run/{page.run('a')['id']}/stop", {})
        assert (code, answer) == (200, {"pid": process.pid})
        assert until(process.poll) == -signal.SIGTERM
        code, answer = page.post(f"/api/board/run/{page.run('a')['id']}/stop", {})
        assert code == 409


@pytest.mark.parametrize(("pid", "host", "problem"), [(1, "", "unknown"), (0, "", "unknown"), (7, "far", "is on far")])
def test_stop_signals_no_other_process(root: Path, pid: int, host: str, problem: str) -> None:
    """Numbers that mean groups of processes, the first process, or a process of another machine."""
    folder = finished_run(root / "a").folder

    def hold() -> None:
        with only_writer(folder):
            record = {"pid": pid, "host": host or os.uname().nodename, "since": 0}
            (folder / LOCK).write_text(json.dumps(record))
            signal.pause()

    with Child(hold):
        until(lambda: (folder / LOCK).exists() and '"since": 0}' in (folder / LOCK).read_text())
        with pytest.raises(UserError, match=problem):
            stop(folder)


@pytest.mark.parametrize(
    ("output_dir", "where"),
    [
        ("project/outputs/a", "."),
        ("./outputs/a", "project"),
        ("{root}/project/outputs/a", "{root}"),
        ("outputs/b", None),
        ("../outputs/a", None),
        ("/elsewhere/a", None),
        ("", None),
    ],
)
def test_a_run_resumes_where_it_was_started(root: Path, output_dir: str, where: str | None) -> None:
    named = output_dir.format(root=root)
    folder = finished_run(root / "project" / "outputs" / "a", data={"output_dir": named}).folder
    if where is None:
        with pytest.raises(UserError, match=r"loopos train .* --resume"):
            resume_command(read_run(folder), root)
        return
    command, start = resume_command(read_run(folder), root)
    assert command == [sys.executable, "-m", "loopos", "train", str(folder / "config.json"), "--resume"]
    assert start.resolve() == (root / where.format(root=root)).resolve()


def test_several_processes_are_not_resumed_from_here(root: Path) -> None:
    run = RunWriter(root / "a", config_of(data={"output_dir": "outputs/a"}))
    run.session(machine={"processes": 4})
    run.close()
    with pytest.raises(UserError, match="4 processes"):
        resume_command(read_run(run.folder), root)


def test_what_a_resumed_process_prints_is_shown(root: Path) -> None:
    """The training data is missing: the process ends at once and says why."""
    finished_run(root / "a", data={"output_dir": "outputs/a"})
    with opened(root) as page:
        path = f"/api/board/run/{page.run('a')['id']}"
        code, answer = page.post(f"{path}/resume", {})
        assert code == 200
        process = until(lambda: (found := page.get(path)["process"]) and not found["is_active"] and found)
        assert process["status"] == 2
        assert "rows.jsonl" in process["printed"]
        assert answer["pid"] != os.getpid()
    assert (root / "a.resume.log").read_text() == process["printed"]
