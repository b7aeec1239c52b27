"""Runs the calls of one turn: each with a limit on its time, and whatever goes wrong as text to the model, counted.

A call runs in a thread. After its time an exception is raised in that thread, which ends Python code; code that does
not notice, such as a long call of a C library, is left behind, and the episode ends.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopos.data.tool_calls import ToolCall
from loopos.rl.environments import ArgumentError, EnvironmentClass

FAILURES = ("malformed", "unknown_tool", "arguments", "exception", "timeout")
"""Why a call fails: it cannot be read; names no tool; its arguments do not fit; the tool raised, or took too long."""
_GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to. `text`: for the model. `failure`: one of `FAILURES`, or empty. `stuck`: it still runs."""

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


def run_calls(
    environment: EnvironmentClass,
    state: Any,
    calls: Sequence[ToolCall],
    malformed: Sequence[str],
    limits: CallLimits,
) -> list[Outcome]:
    """The outcomes of a turn's calls, in order, and after them those of malformed calls."""
    outcomes: list[Outcome] = []
    for call in calls:
        outcome = _run(environment, state, call, limits.seconds)
        text = outcome.text
        if len(text) > limits.characters:
            text = f"{text[: limits.characters]}\n[{len(text) - limits.characters} more characters are left out]"
        outcomes.append(Outcome(outcome.name, text, outcome.failure, outcome.stuck))
        if outcome.stuck:
            break
    known = next(iter(environment.tools), "tool")
    return [*outcomes, *(Outcome(known, f"Error: {reason}", "malformed") for reason in malformed)]


def _run(environment: EnvironmentClass, state: Any, call: ToolCall, seconds: float) -> Outcome:
    if call.name not in environment.tools:
        names = ", ".join(environment.tools) or "none"
        return Outcome(call.name, f"Error: there is no tool {call.name}; the tools are {names}", "unknown_tool")
    found: list[Outcome] = []

    def target() -> None:
        try:
            found.append(Outcome(call.name, _text_of(environment.call(state, call))))
        except ArgumentError as problem:
            found.append(Outcome(call.name, f"Error: {problem}", "arguments"))
        # Whatever a tool raises is text to the model; SystemExit would end the thread without a word.
        except (Exception, SystemExit) as problem:  # noqa: BLE001
            found.append(Outcome(call.name, f"Error: {_summary(problem)}", "exception"))
        except _TimeOut:
            pass

    thread = threading.Thread(target=target, name=f"tool {call.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeOut))
        thread.join(_GRACE_SECONDS)
    if found:
        return found[0]
    text = f"Error: {call.name} took longer than {seconds:g} seconds"
    return Outcome(call.name, text, "timeout", stuck=thread.is_alive())


def _summary(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _text_of(value: object) -> str:
    """What a tool returns, as text: JSON unless it is a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
