"""How a run is judged: the best validation so far, the comparison with the start, early stopping and the plateau
schedule. The metrics are computed in `evaluation`.
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
    """`measure` returns the metrics; `metric` is the deciding one, and `mode` whether less ("min") or more ("max") is
    better. `watched` and `watched_mode`: those of early stopping and the plateau schedule. `num_rows`: number of rows,
    for the log. `rows`: a digest of them. `own_metrics`: the user's metrics with their directions, for the log.
    """

    measure: Callable[[], Mapping[str, float]]
    metric: str
    mode: Literal["min", "max"]
    watched: str
    watched_mode: Literal["min", "max"]
    num_rows: int | None = None
    rows: str = ""
    own_metrics: Mapping[str, str] = field(default_factory=dict)


class ValidationTracker:
    """Tracks validations: always the start and the best since; with the config's settings also early stopping and the
    plateau schedule, which count from the first validation after the start.
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
        """Records the validation before the first update, which training has to beat."""
        self.knows_start = True
        self.start.observe(metrics.get(self.validation.metric, math.nan), 0, metrics.get("loss"))

    def observe(self, metrics: Mapping[str, float], step: int) -> bool:
        """Records a validation after the start; returns whether it is the best of these. A missing metric counts as not
        better; the loss breaks ties.
        """
        watched = metrics.get(self.validation.watched, math.nan)
        if self.watched is not None:
            self.watched.observe(watched, step)
        if self.plateau is not None:
            self.plateau.observe(watched)
        return self.best.observe(metrics.get(self.validation.metric, math.nan), step, metrics.get("loss"))

    @property
    def beat_start(self) -> bool | None:
        """Whether the best validation after the start beats the start; None if the start is unknown or its metric
        undefined.
        """
        if self.start.metric is None:
            return None
        best, start = self.best, self.start
        return is_better(best.metric, start.metric, best.mode, loss=best.loss, than_loss=start.loss)

    @property
    def gives_up(self) -> bool:
        """Whether the patience of early stopping is exhausted."""
        return self.watched is not None and self.patience is not None and self.watched.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON."""
        return {
            "best": self.best.state(),
            "start": self.start.state() if self.knows_start else None,
            "watched": self.watched.state() if self.watched is not None else None,
            "plateau": self.plateau.state_dict() if self.plateau is not None else None,
            "judged_by": {"metric": self.validation.metric, "rows": self.validation.rows},
            "watched_by": {"metric": self.validation.watched, "rows": self.validation.rows},
        }

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Restores `state`. Missing parts, such as the start in checkpoints of older versions, stay unknown. Values of
        another metric or of other rows cannot be compared and start anew. Returns a line for the user in that case.
        """
        current = self.state()
        start = state.get("start")
        if state.get("judged_by", current["judged_by"]) == current["judged_by"]:
            self.best.load(state["best"])
            self.knows_start = start is not None
            if start is not None:
                self.start.load(start)
        if state.get("watched_by", current["watched_by"]) == current["watched_by"]:
            if self.watched is not None and state["watched"] is not None:
                self.watched.load(state["watched"])
            if self.plateau is not None and state["plateau"] is not None:
                self.plateau.load_state_dict(state["plateau"])
        if all(state.get(name, current[name]) == current[name] for name in ("judged_by", "watched_by")):
            return []
        return ["the metric or the validation rows have changed: the comparison of validations starts anew"]


def best_of(metrics: Sequence[float | None], mode: Literal["min", "max"]) -> int:
    """The index of the best of several runs' metrics: the earliest of equals, the last run if no metric is known."""
    known = [index for index, metric in enumerate(metrics) if metric is not None]
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda index: (sign * (metrics[index] or 0.0), -index), default=len(metrics) - 1)
