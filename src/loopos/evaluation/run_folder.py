"""Reads a run folder: its config and events, how far it came, how it did against its start, and why it ended.

Imports neither torch nor, for runs of this version, numpy. Checkpoints and weights are not read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.aliases import current_settings
from loopos.config.diagnostics import UserError
from loopos.config.differences import changes
from loopos.config.figures import figure
from loopos.functional.comparing import is_better
from loopos.storage.events import current
from loopos.storage.folder_lock import lock_state
from loopos.storage.json_files import read_object

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

    directions = {**METRIC_DIRECTION, **PREFERENCE_METRIC_DIRECTION, **POLICY_METRIC_DIRECTION}
    measured = validations[-1]["metrics"] if validations else {}
    usual = ("reward_within_kl", "reward", "pair_accuracy", "accuracy", "subset_accuracy", "mae", "loss")
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


RunFolderEvent: TypeAlias = dict[str, Any]
State: TypeAlias = Literal["running", "finished", "interrupted", "killed", "failed", "unknown"]
"""running: a process holds the folder's lock. finished: ended by itself. interrupted: ended by a signal, after a
checkpoint. killed: its process is gone without a log entry. failed: ended by an error. unknown: an older version, which
left no lock: still running, or killed."""

CONFIG, EVENTS = "config.json", "events.jsonl"
# Deep enough for outputs/project/run, without searching a whole disk.
_DEEPEST = 4


@dataclass(frozen=True)
class Run:
    """One run: its folder, its resolved config and its events in order."""

    path: Path
    config: Mapping[str, Any]
    events: list[RunFolderEvent]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config.get("computation", {}).get("method", ""))

    @property
    def ended_by(self) -> str | None:
        """How the last session ended: "epochs", "max_steps", "max_time", "early stopping", a signal's name; None if it
        has not, or did not log it.
        """
        for event in reversed(self.events):
            if event["event"] == "end":
                return str(event["metrics"]["stopped_by"])
            if event["event"] == "session":
                break
        return None

    @cached_property
    def state(self) -> State:
        """The state of the run's process; see `State`."""
        lock = lock_state(self.path)
        if lock is not None:
            # A process that ends in order releases the lock; a leftover lock file means that it could not.
            return "running" if lock.is_active else "killed"
        if self.ended_by is not None:
            if self.ended_by == "callback error":
                return "failed"
            return "interrupted" if self.ended_by.startswith("SIG") else "finished"
        keeps_settings = any("settings" in event["metrics"] for event in self._of("session"))
        return "failed" if keeps_settings else "unknown"

    @property
    def status(self) -> str:
        """`state` in a word or two, with the reason if known."""
        if self.state == "unknown":
            return "still running, or killed"
        return f"{self.state} ({self.ended_by})" if self.state in ("finished", "interrupted") else self.state

    @property
    def settings(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The step at which each session began, with its settings, oldest first; those of config.json for an older
        version, which did not log them.
        """
        sessions = [event for event in self.events if event["event"] == "session"]
        return [(event["step"] or 0, event["metrics"].get("settings", self.config)) for event in sessions]

    def history(self) -> dict[str, list[tuple[int, Any]]]:
        """Dotted key → [(step, value from then on)], for every setting that differs between the run's sessions."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for (_, before), (step, after) in itertools.pairwise(self.settings):
            for key, (was, now) in changes(before, after).items():
                found.setdefault(key, [(0, was)]).append((step, now))
        return found

    @property
    def has_model(self) -> bool:
        """Whether the trained model exists."""
        return (self.path / "model" / "config.json").is_file()

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return max((event["step"] for event in self.events if event["step"] is not None), default=0)

    @property
    def total_steps(self) -> int | None:
        """Number of optimizer steps planned."""
        return next((event["metrics"].get("total_steps") for event in self._of("session")), None)

    @property
    def began(self) -> float | None:
        """When the run began (seconds since 1970), before any resume."""
        sessions = (event for event in self.events if event["event"] == "session")
        return next((event["timing"].get("time") for event in sessions), None)

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps (s)."""
        return sum(float(event["timing"].get("seconds", 0.0)) for event in self.events if event["event"] == "step")

    @property
    def tokens_a_second(self) -> float | None:
        """Tokens per second of optimizer steps, without the first two if there are more, because they warm up. None
        without a timed step.
        """
        rates = [(event["timing"]["tokens_per_second"], event["timing"]["seconds"]) for event in self._timed_steps()]
        seconds = sum(spent for _, spent in rates)
        return sum(rate * spent for rate, spent in rates) / seconds if seconds > 0 else None

    def _timed_steps(self) -> list[RunFolderEvent]:
        steps = [event for event in self.events if event["event"] == "step" and "tokens_per_second" in event["timing"]]
        return steps[2:] if len(steps) > 2 else steps

    @cached_property
    def first_metrics(self) -> dict[str, Any]:
        """Metrics of the first validation, before training; empty without one."""
        return next((_unflagged(event) for event in self.events if event["event"] == "validation"), {})

    @cached_property
    def last_metrics(self) -> dict[str, Any]:
        """Metrics of the last validation; empty without one."""
        return next((_unflagged(event) for event in self._of("validation")), {})

    @cached_property
    def outcome(self) -> Outcome:
        """How the run did against its start, and what it exported."""
        return outcome_of(self.config, self.events)

    @property
    def ended(self) -> str:
        """Why the last session ended, as text."""
        return end_reason(self.config, self.events)

    @cached_property
    def exported_metrics(self) -> dict[str, Any]:
        """Validation metrics of the weights that are exported, or would be if the run ended now; empty without."""
        return dict(self.outcome.exported.metrics) if self.outcome.exported is not None else {}

    @property
    def exported_step(self) -> int | None:
        """The optimizer step of those weights."""
        return self.outcome.exported.step if self.outcome.exported is not None else None

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the best validation; None if none beat the start."""
        return self.outcome.best.step if self.outcome.best is not None else None

    @cached_property
    def confusion(self) -> tuple[list[str], list[list[int]]] | None:
        """Class names and counts (row: true class, column: predicted class) on the validation rows."""
        found = next((event["metrics"] for event in self._of("confusion")), None)
        return None if found is None else (list(found["class_names"]), [list(row) for row in found["matrix"]])

    def _of(self, kind: str) -> Iterator[RunFolderEvent]:
        """Events of a kind, newest first."""
        return (event for event in reversed(self.events) if event["event"] == kind)

    def summary(self) -> dict[str, Any]:
        """The run as one flat JSON object."""
        return {
            "run": str(self.path),
            "method": self.method,
            "state": self.state,
            "ended_by": self.ended_by,
            "step": self.step,
            "total_steps": self.total_steps,
            "ended": self.ended,
            "best_step": self.best_step,
            "beat_start": self.outcome.beat_start,
            "exported_step": self.exported_step,
            "metrics": self.exported_metrics,
            "seconds": round(self.seconds, 3),
            "began": self.began,
            "has_model": self.has_model,
        }


def _unflagged(event: RunFolderEvent) -> dict[str, Any]:
    return {name: value for name, value in event["metrics"].items() if name not in FLAGS}


def holds_run(folder: Path) -> bool:
    """Whether `folder` contains a run."""
    return (folder / EVENTS).is_file()


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises `UserError` for a folder without one, or with a broken config or event."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the output_dir of a run (loopos runs list finds them)")
    for name in (CONFIG, EVENTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no run: no {name}; expected the output_dir of a run")
    config = read_object(folder / CONFIG, advice="expected the config that the run wrote")
    return Run(folder, current_settings(config), list(read_events(folder / EVENTS)))


def run_of(model: Path) -> Run | None:
    """The run that owns this model/ or adapter/ folder; None if there is none. Raises `UserError`."""
    return read_run(model.parent) if all((model.parent / name).is_file() for name in (CONFIG, EVENTS)) else None


def read_events(path: Path) -> Iterator[RunFolderEvent]:
    """Every event in order, under the names of today. Ignores an incomplete last line, which a killed process leaves;
    any other broken line raises `UserError` with its line number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: not an event ({error}); expected one JSON object per line"
                ) from error
            if not isinstance(event, dict) or not {"event", "step", "metrics", "timing"} <= set(event):
                raise UserError(f"{path}:{number}: not an event; expected the keys event, step, metrics and timing")
            yield current(event)


def find_runs(folder: Path) -> list[Path]:
    """The folders of all runs in `folder`, by name. Raises `UserError` if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with runs in it, such as outputs")
    found = []
    for path, folders, files in os.walk(folder):
        if EVENTS in files and CONFIG in files:
            found.append(Path(path))
            folders.clear()
        elif len(Path(path).relative_to(folder).parts) >= _DEEPEST:
            folders.clear()
    return sorted(found)
