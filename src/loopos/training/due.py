"""What is due after a step: validation, a line of the log, a checkpoint.

Enters: the settings, and where a run stands. Leaves: whether it is due. All ranks come to the same answer. Left out:
doing it (`fit.py`).
"""

from __future__ import annotations

import time

from loopos.config.sections import TrainingSection
from loopos.training.run_state import Position


class Due:
    """`save_is_overdue`: whether the last checkpoint is older than `training.save_interval`, by the first rank's
    clock.
    """

    def __init__(self, settings: TrainingSection) -> None:
        self._settings = settings
        self._saved_at = time.monotonic()
        self.save_is_overdue = False

    def saved(self) -> None:
        """A checkpoint is being written."""
        self._saved_at, self.save_is_overdue = time.monotonic(), False

    def waits_too_long(self) -> bool:
        """Whether this rank's clock says that a checkpoint is overdue."""
        limit = self._settings.save_interval
        return limit is not None and time.monotonic() - self._saved_at >= limit

    def save(self, position: Position, *, validated: bool, is_best: bool, is_judged: bool) -> bool:
        """Whether a checkpoint is due. is_judged: whether validations judge the run."""
        every = self._settings.save_every
        if self.save_is_overdue and every != "never":
            return True
        if every == "validation":
            return validated and is_judged
        # The best weights are kept whenever they come, not only where a step to save falls on them.
        return falls_due(position, every) or (is_best and self._settings.keep_best and every != "never")


def falls_due(position: Position, every: int | str, unit: int = 1) -> bool:
    """Whether the last step ended at or went over a multiple of `every` units, or ended an epoch."""
    if isinstance(every, str):
        return every in ("epoch", "iteration") and position.cursor.step == 0
    return passes(position, every * unit)


def passes(position: Position, every: int) -> bool:
    """Whether the last step ended at or went over a multiple of `every`."""
    return position.step // every > position.previous_step // every
