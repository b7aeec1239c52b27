"""Runs read from their folders: whole, running, torn and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import UserError
from loopos.config.differences import differences
from loopos.evaluation.run_claim import refuse_started
from loopos.evaluation.run_folder import find_runs, holds_run, read_run


def event(kind: str, step: int | None, metrics: dict[str, Any] | None = None, **timing: float) -> dict[str, Any]:
    return {"event": kind, "step": step, "metrics": metrics or {}, "timing": timing}


FINISHED = [
    event("session", 0, {"resumed": False, "total_steps": 4}, time=100.0),
    event("validation", 0, {"accuracy": 0.25, "best": True}),
    event("step", 2, {"loss": 1.0}, seconds=0.5),
    event("validation", 2, {"accuracy": 0.75, "best": True}),
    event("step", 4, {"loss": 0.5}, seconds=0.25),
    event("validation", 4, {"accuracy": 0.5, "best": False}),
    event("end", 4, {"stopped_by": "epochs"}),
    event("confusion", None, {"class_names": ["a", "b"], "matrix": [[1, 0], [1, 2]]}),
]


def write_run(folder: Path, events: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"computation": {"method": "fine_tuning"}, "training": {"seed": 1}}))
    (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events) + tail)
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", FINISHED))
    assert (run.state, run.ended_by, run.status) == ("finished", "epochs", "finished (epochs)")
    assert (run.step, run.total_steps, run.began, run.step_seconds) == (4, 4, 100.0, 0.75)
    assert (run.best_step, run.exported_metrics["accuracy"]) == (2, 0.75)
    assert (run.first_metrics["accuracy"], run.last_metrics["accuracy"]) == (0.25, 0.5)
    assert run.confusion == (["a", "b"], [[1, 0], [1, 2]])
    assert not run.has_model
    assert run.summary()["metrics"] == {"accuracy": 0.75}


def test_a_run_of_an_older_version_that_was_resumed_runs_still_or_was_killed(tmp_path: Path) -> None:
    events = [*FINISHED[:6], event("end", 4, {"stopped_by": "SIGTERM"}), event("session", 4, {"total_steps": 9})]
    run = read_run(write_run(tmp_path / "run", events))
    assert (run.state, run.status, run.total_steps) == ("unknown", "still running, or killed", 9)


def test_the_first_two_steps_do_not_count_for_the_rate(tmp_path: Path) -> None:
    rates = [(1.0, 9.0), (1.0, 9.0), (100.0, 1.0), (400.0, 2.0)]
    steps = [event("step", i, {}, tokens_per_second=rate, seconds=spent) for i, (rate, spent) in enumerate(rates)]
    assert read_run(write_run(tmp_path / "many", steps)).tokens_a_second == (100 + 800) / 3
    assert read_run(write_run(tmp_path / "two", steps[1:3])).tokens_a_second == (9 + 100) / 10
    assert read_run(write_run(tmp_path / "none", FINISHED)).tokens_a_second is None


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", FINISHED[:3], tail='{"event": "st'))
    assert len(run.events) == 3


@pytest.mark.parametrize("broken", ["not json\n", "[1]\n", '{"event": "step"}\n'])
def test_a_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    folder = write_run(tmp_path / "run", FINISHED[:1])
    with (folder / "events.jsonl").open("a") as file:
        file.write(broken + json.dumps(FINISHED[1]) + "\n")
    with pytest.raises(UserError, match=r"events\.jsonl:2: not an event"):
        read_run(folder)


def test_runs_are_found_below_and_not_inside_one_another(tmp_path: Path) -> None:
    write_run(tmp_path / "b" / "deep", FINISHED)
    write_run(tmp_path / "a", FINISHED)
    write_run(tmp_path / "a" / "inside", FINISHED)
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b" / "deep"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "absent")
    assert find_runs(tmp_path) == []


def test_a_started_run_is_not_overwritten(tmp_path: Path) -> None:
    refuse_started(tmp_path)
    folder = write_run(tmp_path / "run", FINISHED[:1])
    assert holds_run(folder)
    with pytest.raises(UserError, match="--resume"):
        refuse_started(folder)


def test_differences_are_found_key_by_key() -> None:
    one = {"a": 1, "b": {"c": 2, "d": {"e": [1]}}, "only": None, "gone": 5}
    other = {"a": 1, "b": {"c": 3, "d": {"e": [1, 2]}}, "new": True, "only": None}
    assert differences(one, other) == {"b.c": (2, 3), "b.d.e": ([1], [1, 2]), "gone": (5, None), "new": (None, True)}
