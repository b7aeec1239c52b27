"""When a run ends before its last step: signals, a time limit, and a metric that no longer improves.

Enters: signals of the system, validation metrics. Leaves: the reason to stop, or none. Left out: what is saved then
(`fit.py`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from loopos.config.diagnostics import Interrupted
from loopos.functional.comparing import is_better
from loopos.storage.terminals import leave_the_terminal

# How a run that a signal ended exits, after its checkpoint: what a scheduler or a closed terminal sends is an orderly
# end, Ctrl-C is not.
EXIT_CODES = {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 0, "SIGUSR1": 0}
# A process that was started to ignore these (nohup) goes on ignoring them.
_MAY_BE_IGNORED = ("SIGHUP", "SIGUSR1")
# The run is over, its weights are exported, and a script should look at why.
GUARD, GUARD_EXIT_CODE = "guard", 4


class StopSignals:
    """Remembers the first of some signals, so that what is in progress ends in order. A second Ctrl-C interrupts at
    once. `at_once`: raise `Interrupted` at the first already, where nothing is in progress that has to end in order.
    """

    def __init__(
        self, names: Sequence[str] = ("SIGTERM", "SIGINT"), *, answer: str = "", at_once: str = "", speaks: bool = True
    ) -> None:
        """answer: what is printed at the first signal, from the handler itself, with {name}; at_once: the message of
        `Interrupted`, with {name}. speaks: whether this process prints.
        """
        self.received: str | None = None
        self._names, self._answer, self._at_once, self._speaks = names, answer, at_once, speaks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone handle signals; a run in another one is stopped by its owner.
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in self._names:
            number = signal.Signals[name]
            if name in _MAY_BE_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            raise KeyboardInterrupt
        is_first, self.received = self.received is None, name
        if name == "SIGHUP":
            leave_the_terminal()
        if self._at_once:
            raise Interrupted(self._at_once.format(name=name), EXIT_CODES[name])
        if is_first and self._answer:
            self._print(self._answer.format(name=name) + ("; Ctrl-C again to stop now" if name == "SIGINT" else ""))

    def _print(self, line: str) -> None:
        # Not through sys.stderr, whose buffer the signal may have found half written.
        if self._speaks:
            with suppress(OSError):
                os.write(2, f"\n{line}\n".encode())


def steps_end_in_order(*, speaks: bool = True) -> StopSignals:
    """For the loop of a run: the step in progress ends, and a checkpoint is written."""
    return StopSignals(tuple(EXIT_CODES), answer="{name}: stopping after this step", speaks=speaks)


def run_ends_at_once() -> StopSignals:
    """For what a run does before its first step and after its last one: nothing there is lost."""
    return StopSignals(
        tuple(EXIT_CODES),
        at_once="ended by {name}, not within a step: the same command with --resume continues from the newest "
        "checkpoint, or from the beginning where there is none yet",
    )


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
