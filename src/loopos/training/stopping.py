"""When a run ends before its last step: signals, a time limit, and a metric that no longer improves.

Enters: signals of the system, validation metrics. Leaves: the reason to stop, or none. Left out: what is saved then
(`fit.py`).
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from loopos.functional.comparing import is_better

# How a run that a signal ended exits, after its checkpoint: a scheduler's SIGTERM is an orderly end, Ctrl-C is not.
EXIT_CODES = {"SIGTERM": 0, "SIGINT": 130}
# The run is over, its weights are exported, and a script should look at why.
GUARD, GUARD_EXIT_CODE = "guard", 4


class StopSignals:
    """Remembers the first SIGTERM or SIGINT, so that the step in progress ends and a checkpoint is written. A
    second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone handle signals; a run in another one is stopped by its owner.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@dataclass
class Best:
    """The best validation so far. `mode`: "min" or "max". `stale`: validations since it improved by more than
    `min_delta`. `loss`: that of the best validation, by which ties are broken; None where none is known.
    """

    mode: str
    min_delta: float = 0.0
    metric: float | None = None
    step: int | None = None
    stale: int = 0
    loss: float | None = None

    def observe(self, metric: float, step: int, loss: float | None = None) -> bool:
        """Takes one validation's metric; whether it is a new best. nan and inf are none, and equal metrics are one
        only with a lower loss.
        """
        if is_better(metric, self.metric, self.mode, loss=loss, than_loss=self.loss, min_delta=self.min_delta):
            self.metric, self.step, self.stale, self.loss = metric, step, 0, loss
            return True
        self.stale += 1
        return False

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint needs to go on; JSON."""
        return {"metric": self.metric, "step": self.step, "stale": self.stale, "loss": self.loss}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; one of an older version holds no loss."""
        self.metric, self.step, self.stale = state["metric"], state["step"], state["stale"]
        self.loss = state.get("loss")
