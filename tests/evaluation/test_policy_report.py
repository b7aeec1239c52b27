"""The report of a policy: comparisons use the same prompts, curves are by iteration, monitors are accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopos.evaluation import policy_report
from loopos.evaluation.report import write_report
from loopos.evaluation.run_folder import read_run


def event(kind: str, step: int, **metrics: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "metrics": metrics, "timing": {}}


# Two updates an iteration. The training prompts are harder than those of validation.
EVENTS = [
    event("session", 0, iterations=3),
    event("best_of_n", 0, n=1, kl=0.0, reward=-1.0),
    event("best_of_n", 0, n=4, kl=0.636, reward=-0.5),
    event("validation", 0, reward=-0.95, kl=0.0, best=False),
    event("rollout", 0, iteration=0, reward=-3.05, kl=0.0, entropy=2.0),
    event("step", 1, clip_share=0.1, value_loss=4.0),
    event("step", 2, clip_share=0.3, value_loss=2.0),
    event("rollout", 2, iteration=1, reward=-2.5, kl=0.5, entropy=1.5),
    event("alert", 2, name="entropy", value=1.5, limit=1.8, message="entropy 1.5 fell below 90% of its start (2)"),
    event("step", 3, clip_share=0.5),
    event("step", 4, clip_share=0.7),
    event("validation", 4, reward=-0.7, kl=0.6, best=True, best_trained=True),
    event("rollout", 4, iteration=2, reward=-2.0, kl=0.9, entropy=1.5),
    event("step", 5, clip_share=0.2),
]
GUARDS = {"kl": None, "entropy_share": 0.9, "length_ratio": 2.0, "stop": True, "patience": 1}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose pictures are not drawn: that takes a second each."""
    for place in ("report.curves_svg", "policy_report.curves_svg", "policy_report.frontier_svg"):
        monkeypatch.setattr(f"loopos.evaluation.{place}", lambda *values, **named: "<svg/>")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in EVENTS))
    config = {"computation": {"mode": "posttraining", "method": "ppo"}, "guards": GUARDS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_frontier_compares_the_same_prompts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        policy_report,
        "frontier_svg",
        lambda path, best, label: drawn.update(path=path, best=best, label=label) or "<svg/>",
    )
    write_report(run)
    assert [(p.name, p.kl, p.reward) for p in drawn["path"]] == [("start", 0.0, -0.95), ("iteration 2", 0.6, -0.7)]
    assert [(p.name, p.kl, p.reward) for p in drawn["best"]] == [("best of 1", 0.0, -1.0), ("best of 4", 0.636, -0.5)]
    assert drawn["label"] == "policy, validation prompts"
    text = (run / "report.md").read_text()
    assert "| 1 | 0 | -1 |  |" in text
    # The figures of the training prompts stand apart, by iteration.
    assert "| 1 | -3.05 | 0 | 2 |" in text


def test_curves_go_by_the_iterations_that_the_policy_had_been_trained_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        policy_report, "curves_svg", lambda panels, axis: drawn.update(panels=panels, axis=axis) or "<svg/>"
    )
    policy_report.policy_blocks(read_run(run))
    assert drawn["axis"] == "iterations trained"
    assert drawn["panels"]["Reward"] == {
        "training": [(0.0, -3.05), (1.0, -2.5), (2.0, -2.0)],
        "validation": [(0.0, -0.95), (2.0, -0.7)],
    }
    # The mean over an iteration's updates: 0.1 and 0.3, 0.5 and 0.7, 0.2.
    clipped = drawn["panels"]["Clipped fraction"]["training"]
    assert [place for place, _ in clipped] == [0.0, 1.0, 2.0]
    assert [value for _, value in clipped] == pytest.approx([0.2, 0.6, 0.2])
    assert "Judge" not in drawn["panels"]


def test_every_monitor_is_accounted_for(run: Path) -> None:
    write_report(run)
    lines = (run / "report.md").read_text().splitlines()
    for expected in (
        "| guards.kl | off |  |",
        "| guards.entropy_share | entropy at least 0.9 of its start | step 2: 1.5, limit 1.8 |",
        "| guards.length_ratio | mean length within a factor of 2 of its start | never |",
        "| guards.judge_drop | off |  |",
        "An alert ends the run.",
        "Step 2: entropy 1.5 fell below 90% of its start (2).",
    ):
        assert expected in lines, expected
