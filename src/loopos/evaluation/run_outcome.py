"""How a run did against its start, and why it ended, from its config and events.

Imports neither torch nor, for runs of this version, numpy. `run_folder` reads the files; reports, commands and
`loopos.Run` show what is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loopos.config.figures import figure
from loopos.functional.comparing import is_better

Event: TypeAlias = Mapping[str, Any]

# Keys of a validation event other than metrics.
FLAGS = ("best", "best_trained")


@dataclass(frozen=True)
class Measured:
    """One validation: its step, and its metrics without flags."""

    step: int
    metrics: Mapping[str, Any]

    def of(self, name: str | None) -> float | None:
        """The value of a metric; None if it is absent or not finite."""
        value = self.metrics.get(name) if name is not None else None
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Outcome:
    """`metric` and `mode` decide what is best. `start`: the validation before the first update; `best_trained`: the
    best one after it; `beat_start`: None if unknown. `exported`: the validation of the weights that are exported, or
    would be if the run ended now; `weights`: "best", "best trained", "start" or "last", None before the export.
    `of_round`: their round of self-improvement, which has its own folder and log.
    """

    metric: str | None
    mode: str
    start: Measured | None
    best_trained: Measured | None
    beat_start: bool | None
    exported: Measured | None
    weights: str | None
    of_round: int | None = None

    @property
    def best(self) -> Measured | None:
        """The best validation; None if training did not beat the start."""
        return None if self.beat_start is False else self.best_trained

    def verdict(self) -> str:
        """The outcome in one sentence; empty without validation."""
        if self.metric is None or (self.best_trained is None and self.beat_start is None):
            return ""
        if self.best_trained is None:
            return f"training did not beat the start: {self.metric} is not a finite number after it"
        found, before = self.best_trained.of(self.metric), self.start.of(self.metric) if self.start else None
        value = "undefined" if found is None else figure(found)
        if self.beat_start is None or before is None:
            return f"best validation: {self.metric} {value} at step {self.best_trained.step}"
        if self.beat_start:
            tie = self._tie() if found == before else ""
            return (
                f"best validation: {self.metric} {value} at step {self.best_trained.step}; before training it was "
                f"{figure(before)}{tie}"
            )
        at_best = f"{self.metric} is {value} at best (step {self.best_trained.step})"
        return f"training did not beat the start: {at_best} and was {figure(before)} before training"

    def _tie(self) -> str:
        loss = self.best_trained.of("loss") if self.best_trained is not None else None
        before = self.start.of("loss") if self.start is not None else None
        return "" if loss is None or before is None else f", with loss {figure(before)} then and {figure(loss)} now"

    def export_sentence(self) -> str:
        """Which weights were exported; empty before the export."""
        if self.weights is None or self.exported is None:
            return ""
        step = self.exported.step
        # Logs of older versions called weights the best even if they did not beat the start.
        weights = "best trained" if self.weights == "best" and self.beat_start is False else self.weights
        return {
            "best": f"exported: the best weights, of step {step}",
            "best trained": f"exported: the weights of step {step}, the best after the start",
            "start": "exported: the weights of the start",
            "last": f"exported: the last weights, of step {step}",
        }[weights] + ("" if self.of_round is None else f" of round {self.of_round}")


def outcome_of(config: Mapping[str, Any], events: Sequence[Event]) -> Outcome:
    """The outcome of a run, finished or not."""
    validations = [event for event in events if event["event"] == "validation" and event["step"] is not None]
    measured = [Measured(event["step"], _metrics(event)) for event in validations]
    start = next((each for each in measured if each.step == 0), None)
    # The newest marked one: each is better than those before it. Older versions have no "best_trained".
    marked = [
        each
        for each, event in zip(measured, validations, strict=True)
        if each.step > 0 and (event["metrics"].get("best_trained") or event["metrics"].get("best"))
    ]
    best = marked[-1] if marked else None
    metric, mode = _judged_by(config, events, validations)
    beat = None
    if start is not None and start.of(metric) is not None and len(measured) > 1:
        than, trained = start.of(metric), best.of(metric) if best is not None else None
        losses = best.of("loss") if best is not None else None, start.of("loss")
        beat = is_better(trained, than, mode, loss=losses[0], than_loss=losses[1])
    exports = [event for event in events if event["event"] == "export"]
    weights, exported, of_round = None, best, None
    if exports:
        taken, step = exports[-1]["metrics"], int(exports[-1]["step"])
        weights, of_round = str(taken["weights"]), taken.get("round")
        here = () if of_round is not None else reversed(measured)
        exported = next((each for each in here if each.step == step), Measured(step, {}))
    if exported is None and measured and measured[-1].step > 0:
        exported = measured[-1]
    return Outcome(metric, mode, start, best, beat, exported, weights, of_round)


def _metrics(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event["metrics"].items() if name not in FLAGS}


def _judged_by(
    config: Mapping[str, Any], events: Sequence[Event], validations: Sequence[Event]
) -> tuple[str | None, str]:
    """The metric that decides and its direction: from the log, or the method's default for older versions, which did
    not log it.
    """
    for event in reversed(events):
        if event["event"] == "session" and "judged_by" in event["metrics"]:
            found = event["metrics"]["judged_by"]
            return str(found["metric"]), str(found["mode"])
    from loopos.evaluation.metrics import METRIC_DIRECTION
    from loopos.evaluation.policy_metrics import POLICY_METRIC_DIRECTION
    from loopos.evaluation.preference_metrics import PREFERENCE_METRIC_DIRECTION
    from loopos.evaluation.step_metrics import STEP_METRIC_DIRECTION

    directions = {**METRIC_DIRECTION, **PREFERENCE_METRIC_DIRECTION, **STEP_METRIC_DIRECTION, **POLICY_METRIC_DIRECTION}
    measured = validations[-1]["metrics"] if validations else {}
    usual = (
        "reward_within_kl",
        "reward",
        "pair_accuracy",
        "step_accuracy",
        "accuracy",
        "subset_accuracy",
        "mae",
        "loss",
    )
    name = config.get("training", {}).get("metric") or next((each for each in usual if each in measured), None)
    # Multi-label runs are judged by micro F1, and only they measure subset accuracy.
    name = "micro_f1" if name == "subset_accuracy" else name
    return name, str(directions.get(name or "", "max"))


def end_reason(config: Mapping[str, Any], events: Sequence[Event]) -> str:
    """Why the last session ended, as text; "still running, or killed" if the log does not say."""
    settings: Mapping[str, Any] = config.get("training", {})
    session: Mapping[str, Any] = {}
    stopped_by, callback = None, "a callback"
    for event in reversed(events):
        if event["event"] == "end" and stopped_by is None:
            stopped_by = str(event["metrics"]["stopped_by"])
            callback = str(event["metrics"].get("callback", callback))
        if event["event"] == "session":
            session = event["metrics"]
            break
    if stopped_by is None:
        return "still running, or killed"
    match stopped_by:
        case "epochs":
            return _finished(settings, session)
        case "max_iterations" | "max_steps":
            return f"stopped at {stopped_by} {settings.get(stopped_by)}"
        case "max_time":
            return f"stopped after max_time {settings.get('max_time')}"
        case "early stopping":
            early = settings.get("early_stopping") or {}
            watched = early.get("metric") or session.get("judged_by", {}).get("metric") or "the metric"
            return f"stopped early: {watched} did not improve in {early.get('patience')} validations"
        case "guard":
            alerts = [event["metrics"] for event in events if event["event"] == "alert"]
            alert = alerts[-1].get("message") or alerts[-1]["name"] if alerts else "an alert"
            return f"stopped by a guard: {alert}"
        case "callback":
            return f"stopped by {callback}"
        case "callback error":
            return f"stopped by an error in {callback}"
        case "SIGINT":
            return "interrupted by Ctrl-C"
        case _:
            return f"interrupted by {stopped_by}"


def _finished(settings: Mapping[str, Any], session: Mapping[str, Any]) -> str:
    if "iterations" in session and "versions" not in session:
        # Older versions logged "epochs" even if max_iterations was the cause.
        return f"finished all {session['iterations']} iterations"
    number = settings.get("num_epochs")
    unit = "pass over the prompts" if "iterations" in session else "epoch"
    if number == 1:
        return f"finished its {unit}"
    return f"finished all {number} {'passes over the prompts' if 'iterations' in session else 'epochs'}"
