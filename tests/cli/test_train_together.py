"""Two runs in one folder, `runs` commands on a live run, and a run whose terminal is closed, with real forked processes."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopos.cli.commands import app
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def run_app(words: list[str], output: Path | None) -> None:
    """The command line in a forked process; does not return."""
    code = 99
    try:
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        app(words)
    except SystemExit as ended:
        code = int(str(ended.code))
    finally:
        os._exit(code)


def forked(words: list[str], output: Path) -> int:
    child = os.fork()
    if child == 0:
        run_app(words, output)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    events = folder / "events.jsonl"
    return events.read_text(encoding="utf-8").count('"event":"step"') if events.exists() else 0


def words_for(project: Path, folder: Path, *more: str) -> list[str]:
    return ["train", str(project / "run.json"), "--quiet", f"data.output_dir={folder}", *more]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times a pico run's time."""
    monkeypatch.setattr("loopos.methods.base.write_report", lambda folder: folder)


ENDLESS = ("training.num_epochs=100000", "training.validate_every=never")


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_of_two_runs_into_one_folder_one_trains_and_the_other_names_it(
    resume: tuple[str, ...], trained: Any, project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = words_for(project, folder, *resume, *ENDLESS)
    children = {forked(words, tmp_path / f"{number}.txt"): tmp_path / f"{number}.txt" for number in range(2)}
    ended: list[tuple[int, int]] = []

    def one_has_ended() -> bool:
        ended.extend(found for found in (os.waitpid(child, os.WNOHANG) for child in children) if found[0])
        return bool(ended)

    wait_for(one_has_ended)
    ((loser, status),) = ended
    (winner,) = set(children) - {loser}
    assert os.waitstatus_to_exitcode(status) == 2
    summary = children[loser].read_text(encoding="utf-8")
    assert f"{folder} is in use by process {winner} on " in summary
    assert "Traceback" not in summary
    wait_for(lambda: steps_of(folder) >= 3)
    os.kill(winner, signal.SIGTERM)
    assert code_of(winner) == 0
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events].count("session") == 1
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert not (folder / "run.lock").exists()


def test_runs_list_distinguishes_running_interrupted_killed_and_finished(
    trained: Any, project: Path, tmp_path: Path, invoke: Invoke
) -> None:
    def listed() -> dict[str, Any]:
        found = json.loads(invoke("runs", "list", tmp_path, "--json").stdout)
        return {Path(run["run"]).name: run for run in found}

    folder = tmp_path / "run"
    child = forked(words_for(project, folder, *ENDLESS), tmp_path / "output.txt")
    wait_for(lambda: steps_of(folder) >= 2)
    assert listed()["run"]["state"] == "running"
    refused = invoke(*words_for(project, folder, *ENDLESS, "--resume"))
    assert (refused.exit_code, f"in use by process {child} on" in refused.stderr) == (2, True)
    os.kill(child, signal.SIGUSR1)
    assert code_of(child) == 0
    assert (listed()["run"]["state"], listed()["run"]["ended_by"]) == ("interrupted", "SIGUSR1")
    began = listed()["run"]["began"]
    interrupted_at = listed()["run"]["step"]

    child = forked(words_for(project, folder, *ENDLESS, "--resume"), tmp_path / "output.txt")
    wait_for(lambda: steps_of(folder) > interrupted_at + 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert listed()["run"]["state"] == "killed"
    assert "killed" in invoke("runs", "show", folder).stdout.splitlines()[0]

    # What it resumes with is told by step, and the beginning stays the first one.
    enough = f"training.max_steps={interrupted_at + 1}"
    result = invoke(*words_for(project, folder, *ENDLESS, "--resume", enough, "training.learning_rate=0.02"))
    assert result.exit_code == 0
    assert "training.learning_rate: was 0.01, is 0.02" in result.stderr.splitlines()
    assert (listed()["run"]["state"], listed()["run"]["began"]) == ("finished", began)
    shown = invoke("runs", "show", folder).stdout
    assert f"0.01, from step {interrupted_at}: 0.02" in shown
    compared = invoke("runs", "diff", folder, project / "outputs" / "first").stdout
    assert f"0.01, from step {interrupted_at}: 0.02" in compared


def test_a_run_whose_terminal_is_closed_saves_and_ends(trained: Any, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        run_app([word for word in words_for(project, folder, *ENDLESS) if word != "--quiet"], None)
    wait_for(lambda: steps_of(folder) >= 2)
    os.close(terminal)
    assert code_of(child) == 0
    last = json.loads((folder / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["event"], last["metrics"]) == ("end", {"stopped_by": "SIGHUP"})
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1
