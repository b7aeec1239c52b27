"""Reads a run folder: its config and events, and how far it came.

Imports neither torch nor, for runs of this version, numpy. Checkpoints and weights are not read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loopos.config.aliases import current_settings
from loopos.config.diagnostics import UserError
from loopos.config.differences import changes
from loopos.evaluation.run_outcome import FLAGS, Outcome, end_reason, outcome_of
from loopos.storage.events import read as read_events
from loopos.storage.folder_lock import lock_state
from loopos.storage.json_files import read_object

RunFolderEvent: TypeAlias = dict[str, Any]
State: TypeAlias = Literal["running", "finished", "interrupted", "killed", "failed", "unknown"]
"""running: a process holds the folder's lock. finished: ended by itself. interrupted: ended by a signal, after a
checkpoint. killed: its process is gone without a log entry. failed: ended by an error. unknown: an older version, which
left no lock: still running, or killed."""

CONFIG, EVENTS = "config.json", "events.jsonl"
SAMPLES, ROLLOUTS = "samples.jsonl", "rollouts.jsonl"
# Deep enough for outputs/project/run, without searching a whole disk.
_DEEPEST = 4


class RunFolder:
    """One run, as its files describe it. Each file is read when it is first needed; `read_run` reads and checks them at
    once. `events`: for who has read them already.
    """

    def __init__(self, folder: str | os.PathLike[str], *, events: list[RunFolderEvent] | None = None) -> None:
        self.folder = Path(folder)
        if events is not None:
            self.events = events

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config with every default. Raises `UserError` for a broken file."""
        return current_settings(read_object(self.folder / CONFIG, advice="expected the config that the run wrote"))

    @cached_property
    def events(self) -> list[RunFolderEvent]:
        """What `events.jsonl` holds, in order. Raises `UserError` for a broken line."""
        return list(read_events(self.folder / EVENTS))

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The texts that a language model generated at each validation, one dict each with its `step`; empty for other
        models. Raises `UserError` for a broken line.
        """
        return read_samples(self.folder / SAMPLES)

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """The answers of training that an online run stored (`training.log_rollouts`), one dict each with its
        `iteration`. Raises `UserError` for a broken line.
        """
        return read_samples(self.folder / ROLLOUTS)

    def read(self) -> None:
        """Reads config and events now. Raises `UserError` for a folder without a run, or with a broken file."""
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such folder; expected the output_dir of a run (loopos runs list finds them)"
            )
        for name in (CONFIG, EVENTS):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder}: no run: no {name}; expected the output_dir of a run")
        _ = self.config, self.events

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
        lock = lock_state(self.folder)
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

    def setting_changes(self) -> dict[str, list[tuple[int, Any]]]:
        """Dotted key → [(step, value from then on)], for every setting that differs between the run's sessions."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for (_, before), (step, after) in itertools.pairwise(self.settings):
            for key, (was, now) in changes(before, after).items():
                found.setdefault(key, [(0, was)]).append((step, now))
        return found

    @property
    def has_model(self) -> bool:
        """Whether the trained model exists."""
        return (self.folder / "model" / "config.json").is_file()

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
    def step_seconds(self) -> float:
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
            "run": str(self.folder),
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
            "seconds": round(self.step_seconds, 3),
            "began": self.began,
            "has_model": self.has_model,
        }


def _unflagged(event: RunFolderEvent) -> dict[str, Any]:
    return {name: value for name, value in event["metrics"].items() if name not in FLAGS}


def holds_run(folder: Path) -> bool:
    """Whether `folder` contains a run."""
    return (folder / EVENTS).is_file()


def read_run(folder: Path) -> RunFolder:
    """The run in `folder`. Raises `UserError` for a folder without one, or with a broken config or event."""
    run = RunFolder(folder)
    run.read()
    return run


def run_of(model: Path) -> RunFolder | None:
    """The run that owns this model/ or adapter/ folder; None if there is none. Raises `UserError`."""
    return read_run(model.parent) if all((model.parent / name).is_file() for name in (CONFIG, EVENTS)) else None


def read_samples(file: Path) -> list[dict[str, Any]]:
    """All samples; none without the file. Ignores a last line that a killed process left incomplete."""
    if not file.is_file():
        return []
    found = []
    for index, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{index}: not JSON ({error}); expected one object per line") from error
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


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
