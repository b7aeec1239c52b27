"""Runs the calls of one turn: each with a limit on its time, and whatever goes wrong as text to the model, counted.

The object of an episode is an `Instance`. Those of this file run calls in threads. After its time an exception is
raised in a call's thread, which ends Python code; code that does not notice, such as a long call of a C library, is
left behind, and the episode ends. `contained_environments` has instances in processes of their own.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from loopos.data.conversations import Message
from loopos.data.tool_calls import ToolCall
from loopos.rl.environments import ArgumentError, EnvironmentClass

LIMITS = ("timeout", "memory", "processes", "output", "died")
"""Failures of calls that broke a limit, or ended the process that contains the environment."""
FAILURES = ("malformed", "unknown_tool", "arguments", "exception", *LIMITS)
"""Why a call fails: it cannot be read; names no tool; its arguments do not fit; the tool raised, or broke a limit."""
_GRACE_SECONDS = 1.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to. `text`: for the model. `failure`: one of `FAILURES`, or empty. `stuck`: it still runs, or
    broke a limit of its process: the episode ends.
    """

    name: str
    text: str
    failure: str = ""
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class CallLimits:
    """`seconds` of a call, and `characters` of its result that the model sees."""

    seconds: float
    characters: int


class _TimeOut(BaseException):
    """Raised in a tool's thread after its time; no tool catches it with `except Exception`."""


class Instance(Protocol):
    """An environment's object of one episode."""

    @property
    def done(self) -> bool:
        """Whether the episode is at its end."""
        ...

    def call(self, call: ToolCall, limits: CallLimits) -> Outcome:
        """The outcome of a call of a tool that the environment has."""
        ...

    def reward(self, messages: Sequence[Message]) -> tuple[float | None, str]:
        """The score of the episode, None where there is none, and which of `LIMITS` the reward broke, or empty. Raises
        `UserError`.
        """
        ...

    def close(self) -> None:
        """Frees what the object holds."""
        ...


class Instances(Protocol):
    """Makes the objects of episodes. `workers`: how many at a time."""

    workers: int

    def begin(self, row: Mapping[str, object], source: str) -> tuple[Instance, list[Message]]:
        """A new object and the messages that it begins with. source: of the row, for messages. Raises `UserError`."""
        ...

    def openings(self, rows: Sequence[Mapping[str, object]], sources: Sequence[str]) -> list[list[Message]]:
        """The messages that the episodes of rows begin with. Raises `UserError`."""
        ...

    def close(self) -> None:
        """Ends what makes them."""
        ...


class ThreadInstance:
    """An object in this process, whose calls run in threads."""

    def __init__(
        self, environment: EnvironmentClass, state: Any, row: Mapping[str, object] | None = None, source: str = ""
    ) -> None:
        self._environment, self._state, self._row, self._source = environment, state, row or {}, source

    @property
    def done(self) -> bool:
        return bool(getattr(self._state, "done", False))

    def call(self, call: ToolCall, limits: CallLimits) -> Outcome:
        return _run_in_thread(lambda: outcome_of(self._environment, self._state, call), call.name, limits)

    def reward(self, messages: Sequence[Message]) -> tuple[float | None, str]:
        return self._environment.reward(self._state, messages, self._row, self._source), ""

    def close(self) -> None:
        pass


class ThreadInstances:
    """Objects in this process, made one after another."""

    def __init__(self, environment: EnvironmentClass) -> None:
        self._environment, self.workers = environment, 1

    def begin(self, row: Mapping[str, object], source: str) -> tuple[ThreadInstance, list[Message]]:
        state, messages = self._environment.begin(row, source)
        return ThreadInstance(self._environment, state, row, source), messages

    def openings(self, rows: Sequence[Mapping[str, object]], sources: Sequence[str]) -> list[list[Message]]:
        return [self._environment.begin(*each)[1] for each in zip(rows, sources, strict=True)]

    def close(self) -> None:
        pass


def in_order(function: Callable[..., Result], *arguments: Sequence[Any], workers: int) -> list[Result]:
    """The results for the arguments, `workers` of them at a time."""
    if workers == 1:
        return [function(*each) for each in zip(*arguments, strict=True)]
    with ThreadPoolExecutor(workers, "environment") as pool:
        return [*pool.map(function, *arguments)]


def run_calls(
    environment: EnvironmentClass,
    instance: Instance,
    calls: Sequence[ToolCall],
    malformed: Sequence[str],
    limits: CallLimits,
) -> list[Outcome]:
    """The outcomes of a turn's calls, in order, and after them those of malformed calls."""
    outcomes: list[Outcome] = []
    for call in calls:
        outcome = _unknown(environment, call, limits) or instance.call(call, limits)
        outcomes.append(outcome)
        if outcome.stuck:
            break
    known = next(iter(environment.tools), "tool")
    return [*outcomes, *(Outcome(known, f"Error: {reason}", "malformed") for reason in malformed)]


def _unknown(environment: EnvironmentClass, call: ToolCall, limits: CallLimits) -> Outcome | None:
    if call.name in environment.tools:
        return None
    names = ", ".join(environment.tools) or "none"
    text = f"Error: there is no tool {call.name}; the tools are {names}"
    return Outcome(call.name, shortened(text, limits.characters), "unknown_tool")


def outcome_of(
    environment: EnvironmentClass,
    state: Any,
    call: ToolCall,
    failure_of: Callable[[BaseException], str] = lambda problem: "exception",
) -> Outcome:
    """What a call comes to, without limits. failure_of: the kind of failure of what a tool raises."""
    try:
        return Outcome(call.name, _text_of(environment.call(state, call)))
    except ArgumentError as problem:
        return Outcome(call.name, f"Error: {problem}", "arguments")
    # Whatever a tool raises is text to the model; SystemExit would end the thread without a word.
    except (Exception, SystemExit) as problem:  # noqa: BLE001
        return Outcome(call.name, f"Error: {_summary(problem)}", failure_of(problem))


def late(name: str, seconds: float, *, stuck: bool) -> Outcome:
    """The outcome of a call that took too long."""
    return Outcome(name, f"Error: {name} took longer than {seconds:g} seconds", "timeout", stuck)


def shortened(text: str, characters: int, length: int | None = None) -> str:
    """The first `characters` of a text, and how many more it has. length: of the whole text, where `text` is a part."""
    more = (len(text) if length is None else length) - characters
    return f"{text[:characters]}\n[{more} more characters are left out]" if more > 0 else text


def _run_in_thread(run: Callable[[], Outcome], name: str, limits: CallLimits) -> Outcome:
    found: list[Outcome] = []

    def target() -> None:
        with suppress(_TimeOut):
            found.append(run())

    thread = threading.Thread(target=target, name=f"tool {name}", daemon=True)
    thread.start()
    thread.join(limits.seconds)
    if thread.is_alive():
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeOut))
        thread.join(_GRACE_SECONDS)
    outcome = found[0] if found else late(name, limits.seconds, stuck=thread.is_alive())
    return replace(outcome, text=shortened(outcome.text, limits.characters))


def _summary(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _text_of(value: object) -> str:
    """What a tool returns, as text: JSON unless it is a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
