"""Reasons to end a run before its last step: signals and a metric that no longer improves."""

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

# Exit codes of a run that a signal ended, after its checkpoint: signals of a scheduler or a closed terminal are an
# orderly end, Ctrl-C is not.
EXIT_CODES = {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 0, "SIGUSR1": 0}
# A process that was started to ignore these (nohup) keeps ignoring them.
_MAY_BE_IGNORED = ("SIGHUP", "SIGUSR1")
# The run has ended and its weights are exported; the exit code lets a script check why.
GUARD, GUARD_EXIT_CODE = "guard", 4


class StopSignals:
    """Records the first of some signals, so that the current step can finish. A second Ctrl-C interrupts at once.
    `at_once`: raise `Interrupted` at the first signal, where nothing needs to finish.
    """

    def __init__(
        self, names: Sequence[str] = ("SIGTERM", "SIGINT"), *, answer: str = "", at_once: str = "", prints: bool = True
    ) -> None:
        """answer: printed at the first signal, from the handler, with {name}. at_once: the message of `Interrupted`,
        with {name}. prints: whether this process prints.
        """
        self.received: str | None = None
        self._names, self._answer, self._at_once, self._prints = names, answer, at_once, prints
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only Python's main thread handles signals; a run in another thread is stopped by its owner.
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
        if self._prints:
            with suppress(OSError):
                os.write(2, f"\n{line}\n".encode())


def steps_end_in_order(*, prints: bool = True) -> StopSignals:
    """For the training loop: the current step finishes and a checkpoint is written."""
    return StopSignals(tuple(EXIT_CODES), answer="{name}: stopping after this step", prints=prints)


def run_ends_at_once() -> StopSignals:
    """For everything before the first step and after the last one, where no progress can be lost."""
    return StopSignals(
        tuple(EXIT_CODES),
        at_once="ended by {name} outside of a step: the same command with --resume continues from the newest "
        "checkpoint, or from the start if there is none yet",
    )


@dataclass
class Best:
    """The best validation so far. `mode`: "min" or "max". `stale`: validations since it improved by more than
    `min_delta`. `loss`: of the best validation, to break ties; None if unknown.
    """

    mode: str
    min_delta: float = 0.0
    metric: float | None = None
    step: int | None = None
    stale: int = 0
    loss: float | None = None

    def observe(self, metric: float, step: int, loss: float | None = None) -> bool:
        """Records one validation's metric; returns whether it is a new best. nan and inf never are; an equal metric is
        only with a lower loss.
        """
        if is_better(metric, self.metric, self.mode, loss=loss, than_loss=self.loss, min_delta=self.min_delta):
            self.metric, self.step, self.stale, self.loss = metric, step, 0, loss
            return True
        self.stale += 1
        return False

    def state(self) -> dict[str, float | int | None]:
        """State for a checkpoint, as JSON."""
        return {"metric": self.metric, "step": self.step, "stale": self.stale, "loss": self.loss}

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state`; checkpoints of older versions have no loss."""
        self.metric, self.step, self.stale = state["metric"], state["step"], state["stale"]
        self.loss = state.get("loss")
