"""Why a run ends after a step, and whether that still holds when it is resumed.

Enters: where the run stands, the signal received, what its judges and its method say. Leaves: a reason, or none. All
ranks come to the same one. Left out: what is done then (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loopos.config.sections import TrainingSection
from loopos.training.callbacks import CALLBACK, CALLBACK_ERROR, Callbacks
from loopos.training.distributed import World
from loopos.training.run_state import Position
from loopos.training.validation import Judges


@dataclass(frozen=True)
class Ending:
    """`planned_steps`: of the run without `training.max_steps`, and `planned_end` what has ended then: "epochs", or
    "max_iterations". `gives_up`: the method's own reason to end the run, if it has one now. `callbacks`: those of the
    user's program, of which the first rank's decide.
    """

    settings: TrainingSection
    planned_steps: int
    planned_end: str
    judges: Judges | None
    world: World
    gives_up: Callable[[], str | None]
    callbacks: Callbacks

    @property
    def total_steps(self) -> int:
        """Optimizer steps after which the run ends."""
        limit = self.settings.max_steps
        return self.planned_steps if limit is None else min(self.planned_steps, limit)

    def reason(self, position: Position, received: str | None) -> str | None:
        """received: the name of a signal that this process was sent."""
        # A signal may have reached one rank alone, and clocks differ; all ranks must stop at the same step.
        limit = self.settings.max_time
        late = limit is not None and position.seconds >= limit
        told = [entry for entry in self.world.gather((received, late)) if isinstance(entry, tuple)]
        names = [name for name, _ in told if name is not None]
        if names:
            return str(names[0])
        # An alarm in the last step is the reason, though the run would have ended there anyway.
        called_off = self.called_off()
        if called_off == CALLBACK_ERROR:
            return called_off
        given_up = self.gives_up() or called_off
        if given_up is None and position.step >= self.total_steps:
            return "max_steps" if self.total_steps < self.planned_steps else self.planned_end
        return given_up or ("max_time" if told[0][1] else None)

    def called_off(self) -> str | None:
        """`CALLBACK` or `CALLBACK_ERROR` where a callback has ended the run."""
        # Without callbacks no rank waits for another here.
        reason = self.world.gather(self.callbacks.reason)[0] if self.callbacks else None
        return None if reason is None else str(reason)

    def still_holds(self, position: Position) -> bool:
        """Whether the reason that ended a run still ends it under the settings it is resumed with."""
        reason, limit = position.stopped_by, self.settings.max_time
        if reason == "max_time":
            return limit is not None and position.seconds >= limit
        if reason == "early stopping":
            return self.judges is not None and self.judges.gives_up
        if reason == CALLBACK and self.callbacks:
            return True
        return position.step >= self.total_steps or self.gives_up() == reason
