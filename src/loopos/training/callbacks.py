"""User callbacks of the Python API: functions that receive the events of a run and may end it.

They run only in the process that writes the log, receive a copy of each event, and random states are restored after
each call, so the results of a run do not depend on them.
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
    """A user's function with a label. It raises only `UserError`."""

    @property
    def label(self) -> str: ...

    def __call__(self, event: Mapping[str, Any], /, *, about: str) -> object: ...


@contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restores all global random generators at exit."""
    tensors, state = random_states()
    try:
        yield
    finally:
        restore_random_states(tensors, state)


class Callbacks:
    """Calls each function with each event. `reason`: why the run should end, None while it should not. `label`: of the
    function that ended it. `failure`: the error of a function that failed, which is not called again.
    """

    def __init__(self, functions: Sequence[NamedCallback] = ()) -> None:
        self._functions = list(functions)
        self._any = bool(functions)
        self.reason: str | None = None
        self.label: str | None = None
        self.failure: UserError | None = None

    def __bool__(self) -> bool:
        """Whether there are any; the same on every rank."""
        return self._any

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Calls every function with an event. Raises nothing; errors are stored in `failure`."""
        for function in list(self._functions):
            about = f"the event {event['event']} of step {event['step']}"
            try:
                with preserve_random_states():
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
        """Raises the `UserError` of a callback that failed. state: the state of the run, for the message."""
        if self.failure is not None:
            raise UserError(f"{self.failure}\n{state}") from (self.failure.__cause__ or self.failure)


def _named(label: str, problem: UserError) -> UserError:
    error = UserError(f"{label}: raised {problem}")
    error.__cause__ = problem
    return error
