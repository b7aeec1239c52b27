"""How a run is judged: what is measured, and what follows from it.

Enters: the metrics of each validation. Leaves: whether these weights are the best so far, whether they beat the start,
whether training has stopped getting better, the learning rate's scale at a plateau. Left out: the metrics themselves
(`evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loopos.config.sections import TrainingSection
from loopos.functional.comparing import is_better
from loopos.training.schedules import Plateau
from loopos.training.stopping import Best


@dataclass(frozen=True)
class Validation:
    """`measure` gives the metrics, `metric` names the one that says what is best, `mode` whether less ("min") or more
    ("max") is better. `watched` and `watched_mode` are those of early stopping and of the plateau schedule. `num_rows`:
    rows that are measured, for the log. `rows`: a
    digest of them. `own_metrics`: the user's own, with their directions, for the log.
    """

    measure: Callable[[], Mapping[str, float]]
    metric: str
    mode: Literal["min", "max"]
    watched: str
    watched_mode: Literal["min", "max"]
    num_rows: int | None = None
    rows: str = ""
    own_metrics: Mapping[str, str] = field(default_factory=dict)


class Judges:
    """What remembers validations: the start and the best since, always; early stopping and the plateau schedule, which
    count from the first validation after the start, where the config has them.
    """

    def __init__(self, validation: Validation, settings: TrainingSection) -> None:
        self.validation = validation
        self.best = Best(validation.mode)
        # The validation before the first update; its step is None until there was one.
        self.start = Best(validation.mode)
        early = settings.early_stopping
        self.patience = early.patience if early is not None else None
        self.watched = Best(validation.watched_mode, early.min_delta) if early is not None else None
        self.plateau = (
            Plateau(settings.plateau_factor, settings.plateau_patience, settings.minimum_ratio, validation.watched_mode)
            if settings.schedule == "plateau"
            else None
        )
        self.knows_start = False

    def observe_start(self, metrics: Mapping[str, float]) -> None:
        """Takes the validation before the first update: what training has to beat."""
        self.knows_start = True
        self.start.observe(metrics.get(self.validation.metric, math.nan), 0, metrics.get("loss"))

    def observe(self, metrics: Mapping[str, float], step: int) -> bool:
        """Takes one validation after the start; whether it is the best of these. A metric that is absent counts as not
        better; ties are broken by the loss.
        """
        watched = metrics.get(self.validation.watched, math.nan)
        if self.watched is not None:
            self.watched.observe(watched, step)
        if self.plateau is not None:
            self.plateau.observe(watched)
        return self.best.observe(metrics.get(self.validation.metric, math.nan), step, metrics.get("loss"))

    @property
    def beat_start(self) -> bool | None:
        """Whether the best validation after the start is better than the start; None where the start is not known, or
        the metric was not defined there.
        """
        if self.start.metric is None:
            return None
        best, start = self.best, self.start
        return is_better(best.metric, start.metric, best.mode, loss=best.loss, than_loss=start.loss)

    @property
    def gives_up(self) -> bool:
        """Whether early stopping's patience is used up."""
        return self.watched is not None and self.patience is not None and self.watched.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; JSON."""
        return {
            "best": self.best.state(),
            "start": self.start.state() if self.knows_start else None,
            "watched": self.watched.state() if self.watched is not None else None,
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "judged_by": {"metric": self.validation.metric, "rows": self.validation.rows},
            "watched_by": {"metric": self.validation.watched, "rows": self.validation.rows},
        }

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Resumes from `state`; what it does not hold, such as the start in one of an older version, stays unknown, and
        what was measured by another metric or on other rows, whose values cannot be compared, starts anew. Returns a
        line for the user where that is so.
        """
        mine = self.state()
        start = state.get("start")
        if state.get("judged_by", mine["judged_by"]) == mine["judged_by"]:
            self.best.load(state["best"])
            self.knows_start = start is not None
            if start is not None:
                self.start.load(start)
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
    known = [index for index, metric in enumerate(metrics) if metric is not None]
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda index: (sign * (metrics[index] or 0.0), -index), default=len(metrics) - 1)
