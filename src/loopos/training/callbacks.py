"""Functions of a Python program that see the events of a run, and may end it.

Enters: each event as it was written to `events.jsonl`. Leaves: the reason to end the run, or none. They run in the
process that writes the log and nowhere else, get a copy of the event, and the random states are put back after each:
the numbers of a run do not depend on them. Left out: how a run ends (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol

from loopos.config.diagnostics import UserError
from loopos.training.random_states import random_states, restore_random_states

STOP = "stop"
"""What a callback returns to end the run."""

CALLBACK, CALLBACK_ERROR = "callback", "callback error"
"""Why a run ended: a callback returned `STOP`, or raised."""


class NamedCallback(Protocol):
    """A user's function under a label. Whatever it raises is a `UserError`."""

    @property
    def label(self) -> str: ...

    def __call__(self, event: Mapping[str, Any], /, *, about: str) -> object: ...


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Every global generator is afterwards as it was before, whatever was drawn."""
    tensors, state = random_states()
    try:
        yield
    finally:
        restore_random_states(tensors, state)


class Callbacks:
    """Calls each function with each event. `reason`: why the run is to end, None as long as it goes on. `label`: of the
    function that ended it. `failure`: the error of one that failed, which is not called again.
    """

    def __init__(self, functions: Sequence[NamedCallback] = ()) -> None:
        self._functions = list(functions)
        self._any = bool(functions)
        self.reason: str | None = None
        self.label: str | None = None
        self.failure: UserError | None = None

    def __bool__(self) -> bool:
        """Whether there are any, the same on every rank."""
        return self._any

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Calls every function with an event. Raises nothing: a failure waits in `failure`."""
        for function in list(self._functions):
            about = f"the event {event['event']} of step {event['step']}"
            try:
                with kept_random_states():
                    answer = function(deepcopy(dict(event)), about=about)
                if answer not in (None, STOP):
                    got = f"{type(answer).__name__} {answer!r:.80}"
                    raise UserError(f'{function.label}: returned {got}; expected None, or "{STOP}" to end the run')
            except UserError as problem:
                self._functions.remove(function)
                named = str(problem).startswith(function.label)
                self.failure = self.failure or (problem if named else _named(function.label, problem))
                self.reason, self.label = CALLBACK_ERROR, self.label or function.label
            else:
                if answer == STOP and self.reason is None:
                    self.reason, self.label = CALLBACK, function.label

    def raise_failure(self, state: str) -> None:
        """Raises the `UserError` of a callback that failed. state: how the run stands, for the message."""
        if self.failure is not None:
            raise UserError(f"{self.failure}\n{state}") from (self.failure.__cause__ or self.failure)


def _named(label: str, problem: UserError) -> UserError:
    error = UserError(f"{label}: raised {problem}")
    error.__cause__ = problem
    return error
