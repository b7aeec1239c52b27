"""A run's folder, read: what it is, how far it came, how well it did.

Enters: a folder that holds `config.json` and `events.jsonl`. Leaves: a `Run`. Only files are read, and torch is not
imported. Left out: checkpoints and weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from loopos.config.faults import UserError
from loopos.storage.json_files import read_object

Event: TypeAlias = dict[str, Any]

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
    def status(self) -> str:
        """How the last session ended: "epochs", "max_steps", "max_time", "early stopping", "SIGTERM", "SIGINT", or
        "unfinished" (it runs still, or was killed).
        """
        for event in reversed(self.events):
            if event["event"] == "end":
                return str(event["metrics"]["stopped_by"])
            if event["event"] == "session":
                break
        return "unfinished"

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
        """When the newest session began (seconds since 1970)."""
        return next((event["timing"].get("time") for event in self._of("session")), None)

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
        return next((dict(event["metrics"]) for event in self.events if event["event"] == "validation"), {})

    @cached_property
    def last_metrics(self) -> dict[str, Any]:
        """Metrics of the last validation; empty without one."""
        return next((dict(event["metrics"]) for event in self._of("validation")), {})

    @cached_property
    def best_metrics(self) -> dict[str, Any]:
        """Metrics of the best validation; empty without one."""
        return next((dict(event["metrics"]) for event in self._of("validation") if event["metrics"].get("best")), {})

    @property
    def best_step(self) -> int | None:
        """Optimizer step of the best validation."""
        return next((event["step"] for event in self._of("validation") if event["metrics"].get("best")), None)

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
        metrics = {name: value for name, value in self.best_metrics.items() if name != "best"}
        return {
            "run": str(self.path),
            "method": self.method,
            "status": self.status,
            "step": self.step,
            "total_steps": self.total_steps,
            "best_step": self.best_step,
            "metrics": metrics,
            "seconds": round(self.seconds, 3),
            "began": self.began,
            "has_model": self.has_model,
        }


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`."""
    return (folder / EVENTS).is_file()


def refuse_started(folder: Path) -> None:
    """Raises `UserError` if a run has begun in `folder`: nothing of it is overwritten."""
    if holds_run(folder):
        raise UserError(
            f"data.output_dir: {folder} holds a run already; go on with it by --resume, or name another folder"
        )


def claim(folder: Path, *, resume: bool) -> None:
    """Makes a run's folder. Raises `UserError` if it holds a run or its checkpoints already, unless that is resumed."""
    if not resume:
        refuse_started(folder)
        if any((folder / "checkpoints").glob("step-*")):
            raise UserError(
                f"data.output_dir: {folder} holds checkpoints of another run; wanted an empty or new folder"
            )
    folder.mkdir(parents=True, exist_ok=True)


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


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key → both values, of every key whose values differ; None where one config lacks the key."""
    one, other = _flat(first), _flat(second)
    keys = [*one, *(key for key in other if key not in one)]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
