"""How a run ended, for whoever started it.

Enters: the position and the judges of a run that is over. Leaves: a `FitResult`. It stands apart from the loop so that
what exports the weights need not know the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopos.training.callbacks import CALLBACK_ERROR
from loopos.training.run_state import Position
from loopos.training.stopping import EXIT_CODES
from loopos.training.validation import Judges


@dataclass(frozen=True)
class FitResult:
    """`stopped_by`: "epochs", "max_iterations", "max_steps", "max_time", "early stopping", "guard", "callback",
    "callback error", or the name of a signal. `best_step`, `best_metric`: of the best validation, None where none beat
    the start. `best_trained_step`, `best_trained_metric`: of the best validation after the start, better than it or
    not. `start_metric`: of the validation before the first update; `beat_start`: whether training beat it, None where
    that is not known. `seconds`: in steps, validations and saves.
    """

    step: int
    stopped_by: str
    best_step: int | None
    best_metric: float | None
    tokens: int
    seconds: float
    best_trained_step: int | None = None
    best_trained_metric: float | None = None
    start_metric: float | None = None
    beat_start: bool | None = None

    @classmethod
    def of(cls, position: Position, judges: Judges | None) -> FitResult:
        """The result of a run that stands at `position` and has ended."""
        assert position.stopped_by is not None, "the run has not ended"
        ended = (position.step, position.stopped_by)
        if judges is None:
            return cls(*ended, None, None, position.tokens, position.seconds)
        best, beat = judges.best, judges.beat_start
        return cls(
            *ended,
            best_step=None if beat is False else best.step,
            best_metric=None if beat is False else best.metric,
            tokens=position.tokens,
            seconds=position.seconds,
            best_trained_step=best.step,
            best_trained_metric=best.metric,
            start_metric=judges.start.metric,
            beat_start=beat,
        )

    @property
    def interrupted(self) -> bool:
        """Ended by a signal, or by a callback that failed: there is more to train, and `--resume` continues."""
        return self.stopped_by in EXIT_CODES or self.stopped_by == CALLBACK_ERROR
