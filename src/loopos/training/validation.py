"""How a run is judged: what is measured, and what follows from it.

Enters: the metrics of each validation. Leaves: whether these weights are the best so far, whether training has stopped
getting better, the learning rate's scale at a plateau. Left out: the metrics themselves (`evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loopos.config.sections import TrainingSection
from loopos.training.schedules import Plateau
from loopos.training.stopping import Best


@dataclass(frozen=True)
class Validation:
    """`measure` gives the metrics, `metric` names the one that says what is best, `mode` whether less ("min") or more
    ("max") is better. `watched` and `watched_mode` are those of early stopping and of the plateau schedule. `rows`: a
    digest of what is measured on.
    """

    measure: Callable[[], Mapping[str, float]]
    metric: str
    mode: Literal["min", "max"]
    watched: str
    watched_mode: Literal["min", "max"]
    rows: str = ""


class Judges:
    """What remembers validations: `best` always, early stopping and the plateau schedule where they are asked for."""

    def __init__(self, validation: Validation, settings: TrainingSection) -> None:
        self.validation = validation
        self.best = Best(validation.mode)
        early = settings.early_stopping
        self.patience = early.patience if early is not None else None
        self.watched = Best(validation.watched_mode, early.min_delta) if early is not None else None
        self.plateau = (
            Plateau(settings.plateau_factor, settings.plateau_patience, settings.minimum_ratio, validation.watched_mode)
            if settings.schedule == "plateau"
            else None
        )

    def observe(self, metrics: Mapping[str, float], step: int) -> bool:
        """Takes one validation; whether it is the best so far. A metric that is absent counts as not better."""
        watched = metrics.get(self.validation.watched, math.nan)
        if self.watched is not None:
            self.watched.observe(watched, step)
        if self.plateau is not None:
            self.plateau.observe(watched)
        return self.best.observe(metrics.get(self.validation.metric, math.nan), step)

    @property
    def gives_up(self) -> bool:
        """Whether early stopping's patience is used up."""
        return self.watched is not None and self.patience is not None and self.watched.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; JSON."""
        return {
            "best": self.best.state(),
            "watched": self.watched.state() if self.watched is not None else None,
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "judged_by": {"metric": self.validation.metric, "rows": self.validation.rows},
            "watched_by": {"metric": self.validation.watched, "rows": self.validation.rows},
        }

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Resumes from `state`; what it does not hold starts anew, and so does what was measured by another metric or
        on other rows, whose values cannot be compared. Returns a line for the user where that is so.
        """
        mine = self.state()
        if state.get("judged_by", mine["judged_by"]) == mine["judged_by"]:
            self.best.load(state["best"])
        if state.get("watched_by", mine["watched_by"]) == mine["watched_by"]:
            if self.watched is not None and state["watched"] is not None:
                self.watched.load(state["watched"])
            if self.plateau is not None and state["plateau"] is not None:
                self.plateau.load_state_dict(state["plateau"])
        if all(state.get(name, mine[name]) == mine[name] for name in ("judged_by", "watched_by")):
            return []
        return ["the metric or the validation rows have changed: what is best is judged anew from here on"]


def best_of(metrics: Sequence[float | None], mode: Literal["min", "max"]) -> int:
    """The place of the best of several runs' metrics, the earliest of equals; the last where none is known."""
    known = [place for place, metric in enumerate(metrics) if metric is not None]
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda place: (sign * (metrics[place] or 0.0), -place), default=len(metrics) - 1)
