"""How runs did against their start and why they ended, read off their events."""

from __future__ import annotations

from typing import Any

import pytest

from loopos.evaluation.run_outcome import end_reason, outcome_of


def event(kind: str, step: int | None, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"event": kind, "step": step, "metrics": metrics, "timing": {}}


def judged(metric: str = "accuracy", mode: str = "max", **facts: Any) -> dict[str, Any]:
    return event("session", 0, {"judged_by": {"metric": metric, "mode": mode}, "versions": {}, **facts})


def validation(step: int, best: bool = False, trained: bool = False, **metrics: Any) -> dict[str, Any]:
    return event("validation", step, {**metrics, "best": best, "best_trained": trained})


def test_a_run_that_beat_its_start() -> None:
    events = [
        judged("mae", "min"),
        validation(0, mae=3.0),
        validation(4, best=True, trained=True, mae=2.0),
        validation(8, mae=2.5),
        event("export", 4, {"weights": "best"}),
    ]
    outcome = outcome_of({}, events)
    assert outcome.beat_start is True
    assert outcome.best is not None
    assert outcome.best.step == 4
    assert outcome.verdict() == "best validation: mae 2 at step 4; before training it was 3"
    assert outcome.export_sentence() == "exported: the best weights, of step 4"


def test_weights_of_a_round_are_not_taken_for_the_first_trainings() -> None:
    events = [judged(), validation(0, accuracy=0.1), validation(4, True, True, accuracy=0.5)]
    outcome = outcome_of({}, [*events, event("export", 4, {"weights": "best", "round": 2})])
    assert outcome.export_sentence() == "exported: the best weights, of step 4 of round 2"
    assert outcome.exported is not None
    assert outcome.exported.metrics == {}


def test_a_run_that_only_got_worse() -> None:
    events = [
        judged("reward"),
        validation(0, reward=-0.947),
        validation(4, trained=True, reward=-1.95),
        validation(8, reward=-2.5),
    ]
    outcome = outcome_of({}, events)
    assert (outcome.beat_start, outcome.best, outcome.weights) == (False, None, None)
    assert outcome.exported is not None
    assert outcome.exported.metrics == {"reward": -1.95}
    assert outcome.verdict() == (
        "training did not beat the start: reward is -1.95 at best (step 4) and was -0.947 before training"
    )
    assert outcome.export_sentence() == ""


def test_a_log_of_an_older_version_has_an_outcome_too() -> None:
    """4ff8e20 marked every first validation after the start as best, and did not record by which metric."""
    events = [
        event("session", 0, {"total_steps": 8}),
        event("validation", 0, {"reward": -0.95, "kl": 0.0, "best": False}),
        event("validation", 8, {"reward": -1.95, "kl": 1.0, "best": True}),
    ]
    outcome = outcome_of({"computation": {"method": "ppo"}}, events)
    assert (outcome.metric, outcome.mode, outcome.beat_start, outcome.best) == ("reward", "max", False, None)
    assert outcome.verdict().startswith("training did not beat the start: reward is -1.95")


def test_a_tie_is_broken_and_reported_by_its_loss() -> None:
    events = [judged(), validation(0, accuracy=0.5, loss=2.0), validation(4, True, True, accuracy=0.5, loss=1.5)]
    assert outcome_of({}, events).verdict() == (
        "best validation: accuracy 0.5 at step 4; before training it was 0.5, with loss 2 then and 1.5 now"
    )


@pytest.mark.parametrize(
    "events",
    [
        [],
        [judged()],
        [judged(), validation(0, accuracy=0.5)],
        [judged(), validation(0, loss=1.0), validation(4, True, True, accuracy=0.5)],
    ],
)
def test_unknown_facts_are_not_reported(events: list[dict[str, Any]]) -> None:
    outcome = outcome_of({}, events)
    assert outcome.beat_start is None
    assert "start" not in outcome.verdict()


def test_a_metric_that_is_never_finite_again_did_not_beat_the_start() -> None:
    events = [judged("loss", "min"), validation(0, loss=2.0), validation(4, loss="nan")]
    assert outcome_of({}, events).verdict() == ("training did not beat the start: loss is not a finite number after it")


EARLY = {"early_stopping": {"patience": 3, "metric": None}}
ALERT = event("alert", 4, {"name": "kl", "value": 2.0, "limit": 1.0, "message": "KL 2 is above its limit of 1"})


@pytest.mark.parametrize(
    ("stopped_by", "training", "facts", "expected"),
    [
        ("epochs", {"num_epochs": 4}, {}, "finished all 4 epochs"),
        ("epochs", {"num_epochs": 1}, {}, "finished its epoch"),
        ("epochs", {"num_epochs": 2}, {"iterations": 7}, "finished all 2 passes over the prompts"),
        ("max_iterations", {"max_iterations": 8}, {"iterations": 8}, "stopped at max_iterations 8"),
        ("max_steps", {"max_steps": 7}, {}, "stopped at max_steps 7"),
        ("max_time", {"max_time": "2h"}, {}, "stopped after max_time 2h"),
        ("early stopping", EARLY, {}, "stopped early: accuracy did not improve in 3 validations"),
        ("guard", {}, {}, "stopped by a guard: KL 2 is above its limit of 1"),
        ("SIGINT", {}, {}, "interrupted by Ctrl-C"),
        ("SIGTERM", {}, {}, "interrupted by SIGTERM"),
        (None, {}, {}, "still running, or killed"),
    ],
)
def test_the_true_cause_of_the_end_is_named(
    stopped_by: str | None, training: dict[str, Any], facts: dict[str, Any], expected: str
) -> None:
    earlier = [judged(), event("end", 2, {"stopped_by": "SIGTERM"})]
    events = [*earlier, judged(**facts), ALERT, *([event("end", 4, {"stopped_by": stopped_by})] if stopped_by else [])]
    assert end_reason({"training": training}, events) == expected
