"""A run's folder, read: what it is, how far it came, how well it did.

Enters: a folder that holds `config.json` and `events.jsonl`. Leaves: a `Run`. Only files are read, and torch is not
imported. Left out: checkpoints and weights.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.differences import changes
from loopos.config.faults import UserError
from loopos.evaluation.outcome import FLAGS, Outcome, ending, outcome_of
from loopos.storage.folder_lock import lock_state
from loopos.storage.json_files import read_object

Event: TypeAlias = dict[str, Any]
State: TypeAlias = Literal["running", "finished", "interrupted", "killed", "failed", "unknown"]
"""running: a process holds the folder. finished: ended by itself. interrupted: ended by a signal, after a checkpoint.
killed: its process is gone and could not say so. failed: ended by an error. unknown: of an older version, which left no
sign: still running, or killed."""

CONFIG, EVENTS = "config.json", "events.jsonl"
# Deep enough for outputs/project/run; a whole disk is not searched.
_DEEPEST = 4


@dataclass(frozen=True)
class Run:
    """One run: its folder, its resolved config and its events in order."""

    path: Path
    config: Mapping[str, Any]
    events: list[Event]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config.get("computation", {}).get("method", ""))

    @property
    def ended_by(self) -> str | None:
        """How the last session ended: "epochs", "max_steps", "max_time", "early stopping", a signal's name; None where
        it has not, or could not say.
        """
        for event in reversed(self.events):
            if event["event"] == "end":
                return str(event["metrics"]["stopped_by"])
            if event["event"] == "session":
                break
        return None

    @cached_property
    def state(self) -> State:
        """What is known of the run's process now: `State` tells the values apart."""
        lock = lock_state(self.path)
        if lock is not None:
            # Whoever ends in order lets go of the folder; what is left of a lock tells that its process could not.
            return "running" if lock.is_held else "killed"
        if self.ended_by is not None:
            if self.ended_by == "callback error":
                return "failed"
            return "interrupted" if self.ended_by.startswith("SIG") else "finished"
        keeps_settings = any("settings" in event["metrics"] for event in self._of("session"))
        return "failed" if keeps_settings else "unknown"

    @property
    def status(self) -> str:
        """`state` in a word or two, with the reason where one is known."""
        if self.state == "unknown":
            return "still running, or killed"
        return f"{self.state} ({self.ended_by})" if self.state in ("finished", "interrupted") else self.state

    @property
    def settings(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The step at which each session began, with its settings, oldest first; those of an older version, which did
        not log them, are those of config.json.
        """
        sessions = [event for event in self.events if event["event"] == "session"]
        return [(event["step"] or 0, event["metrics"].get("settings", self.config)) for event in sessions]

    def history(self) -> dict[str, list[tuple[int, Any]]]:
        """Dotted key → (step, value from there on), of every setting that differs between the run's sessions."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for (_, before), (step, after) in itertools.pairwise(self.settings):
            for key, (was, now) in changes(before, after).items():
                found.setdefault(key, [(0, was)]).append((step, now))
        return found

    @property
    def has_model(self) -> bool:
        """Whether the trained model is there to predict with."""
        return (self.path / "model" / "config.json").is_file()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return max((event["step"] for event in self.events if event["step"] is not None), default=0)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps planned."""
        return next((event["metrics"].get("total_steps") for event in self._of("session")), None)

    @property
    def began(self) -> float | None:
        """When the run began (seconds since 1970); what was resumed began before."""
        sessions = (event for event in self.events if event["event"] == "session")
        return next((event["timing"].get("time") for event in sessions), None)

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps (s)."""
        return sum(float(event["timing"].get("seconds", 0.0)) for event in self.events if event["event"] == "step")

    @property
    def tokens_a_second(self) -> float | None:
        """Real tokens trained on a second of optimizer steps, the first two left out where there are more: they warm
        up. None without a timed step.
        """
        rates = [(event["timing"]["tokens_per_second"], event["timing"]["seconds"]) for event in self._timed_steps()]
        seconds = sum(spent for _, spent in rates)
        return sum(rate * spent for rate, spent in rates) / seconds if seconds > 0 else None

    def _timed_steps(self) -> list[Event]:
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
        """Why the last session ended, in words."""
        return ending(self.config, self.events)

    @cached_property
    def exported_metrics(self) -> dict[str, Any]:
        """Validation metrics of the weights that are exported, or would be if the run ended here; empty without."""
        return dict(self.outcome.exported.metrics) if self.outcome.exported is not None else {}

    @property
    def exported_step(self) -> int | None:
        """The optimizer step of those weights."""
        return self.outcome.exported.step if self.outcome.exported is not None else None

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the best validation; None where none beat the start."""
        return self.outcome.best.step if self.outcome.best is not None else None

    @cached_property
    def confusion(self) -> tuple[list[str], list[list[int]]] | None:
        """Class names and counts (row: true class, column: predicted class) on the validation rows."""
        found = next((event["metrics"] for event in self._of("confusion")), None)
        return None if found is None else (list(found["class_names"]), [list(row) for row in found["matrix"]])

    def _of(self, kind: str) -> Iterator[Event]:
        """Events of a kind, newest first."""
        return (event for event in reversed(self.events) if event["event"] == kind)

    def summary(self) -> dict[str, Any]:
        """The run in one flat JSON object."""
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


def _unflagged(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event["metrics"].items() if name not in FLAGS}


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`."""
    return (folder / EVENTS).is_file()


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises `UserError` for a folder without one, or with a broken config or event."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted the output_dir of a run (loopos runs list finds them)")
    for name in (CONFIG, EVENTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no run: it holds no {name}; wanted the output_dir of a run")
    config = read_object(folder / CONFIG, advice="expected the config that the run wrote")
    return Run(folder, config, list(read_events(folder / EVENTS)))


def run_of(model: Path) -> Run | None:
    """The run whose folder model/, or adapter/, this is; None where it lies in none. Raises `UserError`."""
    return read_run(model.parent) if all((model.parent / name).is_file() for name in (CONFIG, EVENTS)) else None


def read_events(path: Path) -> Iterator[Event]:
    """Every event in order. A torn last line, as a killed process leaves it, is left out; any other broken line raises
    `UserError` with its place.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not an event ({error}); wanted one JSON object a line") from error
            if not isinstance(event, dict) or not {"event", "step", "metrics", "timing"} <= set(event):
                raise UserError(f"{path}:{number}: not an event; wanted the keys event, step, metrics and timing")
            yield event


def find_runs(folder: Path) -> list[Path]:
    """The folders of all runs in `folder`, by name. Raises `UserError` if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted a folder with runs in it, such as outputs")
    found = []
    for place, folders, files in os.walk(folder):
        if EVENTS in files and CONFIG in files:
            found.append(Path(place))
            folders.clear()
        elif len(Path(place).relative_to(folder).parts) >= _DEEPEST:
            folders.clear()
    return sorted(found)
