"""Environments whose objects live in processes of their own, contained as programs of models are: `ContainedInstances`.

An object's reset, calls, `done` and reward are messages of JSON. The processes are forks of one that has imported the
environment's module (`evaluation.forked_sandbox`); what runs in them is `made`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import loopos
from loopos.config.diagnostics import UserError
from loopos.config.environments import EnvironmentSection
from loopos.config.machine import usable_cores
from loopos.data.conversations import Message
from loopos.data.record import shown
from loopos.data.tool_calls import ToolCall
from loopos.evaluation.forked_sandbox import ContainedProcess, ForkedSandbox, Stopped
from loopos.evaluation.sandbox import SandboxLimits
from loopos.rl.environments import EnvironmentClass
from loopos.rl.tool_runs import (
    FAILURES,
    CallLimits,
    Instances,
    Outcome,
    ThreadInstances,
    late,
    outcome_of,
    shortened,
)

FILE_SIZE = 64
"""MiB of all files that an object writes."""
OUTPUT = 4
"""MiB that an object prints, and of one answer."""
# Folders of installed packages, which need not lie below Python's own.
_PACKAGES = ("site-packages", "dist-packages")
_FACTORY = f"{__name__}:made"
_KINDS = {"time": "timeout"}


def instances_of(environment: EnvironmentClass, section: EnvironmentSection) -> Instances:
    """What makes the objects of episodes, as `isolation` has it. Raises `UserError`."""
    return ThreadInstances(environment) if section.isolation == "thread" else ContainedInstances(environment, section)


class ContainedInstances:
    """Makes objects in contained processes."""

    def __init__(self, environment: EnvironmentClass, section: EnvironmentSection) -> None:
        """Starts the process that the others are forks of. Raises `UserError` where the system cannot contain
        processes, and for a class that no other process can import.
        """
        self._environment, self._section, self.workers = environment, section, usable_cores()
        kind = environment.type
        argument = {"target": f"{kind.__module__}:{kind.__qualname__}", "name": environment.name}
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            raise UserError(
                f'environment {environment.name}: isolation "process" cannot import {argument["target"]}; expected a '
                "class at the top of a module that Python can find"
            )
        self._sandbox = ForkedSandbox(
            _FACTORY,
            argument,
            limits=SandboxLimits(
                memory=section.tool_memory, processes=section.tool_processes, file_size=FILE_SIZE, output=OUTPUT
            ),
            readable=[
                Path(loopos.__file__).resolve().parent,
                *(Path(each) for each in sys.path if Path(each).name in _PACKAGES),
                *_folders_of(kind.__module__, environment.name),
            ],
            advice="allow namespaces for this user (in a container: seccomp and the capability SYS_ADMIN), or set "
            'environment.isolation to "thread" if you trust the tools with what you can do yourself',
        )

    def begin(self, row: Mapping[str, object], source: str) -> tuple[ContainedInstance, list[Message]]:
        instance = ContainedInstance(self._environment, self._section, self._sandbox.start())
        try:
            return instance, instance.begin(row, source)
        except UserError:
            instance.close()
            raise

    def openings(self, rows: Sequence[Mapping[str, object]], sources: Sequence[str]) -> list[list[Message]]:
        """As `Instances.openings`, in one process as long as it resets: a process for each row would take minutes."""
        found: list[list[Message]] = []
        instance: ContainedInstance | None = None
        try:
            for row, source in zip(rows, sources, strict=True):
                if instance is not None:
                    # What an earlier row left, such as files, may be in the way.
                    with suppress(UserError):
                        found.append(instance.begin(row, source))
                        continue
                    instance.close()
                instance, messages = self.begin(row, source)
                found.append(messages)
        finally:
            if instance is not None:
                instance.close()
        return found

    def close(self) -> None:
        self._sandbox.close()


class ContainedInstance:
    """An object in a contained process."""

    def __init__(self, environment: EnvironmentClass, section: EnvironmentSection, process: ContainedProcess) -> None:
        self._environment, self._section, self._process = environment, section, process
        self._is_counted = False
        self.done = False

    def begin(self, row: Mapping[str, object], source: str) -> list[Message]:
        """The messages that the episode of a row begins with; a new object each time. Raises `UserError`."""
        name, seconds = self._environment.name, self._section.tool_seconds
        problem = _not_json(row, "the row")
        if problem:
            raise UserError(f'environment {name}: {problem}, for isolation "process"\n    for {source}')
        try:
            found = self.ask({"do": "begin", "row": dict(row), "source": source}, seconds)
        except Stopped as stopped:
            hint = f" ({seconds:g} s, environment.tool_seconds)" if stopped.kind == "time" else ""
            raise UserError(f"environment {name}: reset {stopped}{hint}\n    for {source}") from stopped
        return [Message(*each) for each in found]

    def ask(self, message: Mapping[str, object], seconds: float) -> Any:
        """An answer of the process. Raises `Stopped`, and `UserError` for what the user's code does wrong."""
        match self._process.ask(message, seconds):
            case {"error": str(text)}:
                raise UserError(text)
            case {"limit": "memory" | "processes" as limit}:
                raise Stopped(limit, f"passed its limit of {limit}")
            case {"found": found}:
                return found
        raise Stopped("died", "answered with something else than an answer")

    def call(self, call: ToolCall, limits: CallLimits) -> Outcome:
        message = {"do": "call", "name": call.name, "arguments": call.arguments, "characters": limits.characters}
        try:
            found = self.ask(message, limits.seconds)
            match found:
                case {"text": str(text), "failure": str(failure), "length": int(length), "done": bool(done)} if (
                    failure in ("", *FAILURES)
                ):
                    self.done = done
                    text = shortened(text, limits.characters, length)
                    return Outcome(call.name, text, failure, stuck=failure in ("memory", "processes"))
            raise Stopped("died", "answered with something else than an outcome")
        except Stopped as stopped:
            self._is_counted = True
            return self._outcome(call.name, stopped, limits)

    def _outcome(self, name: str, stopped: Stopped, limits: CallLimits) -> Outcome:
        """That of a call which ended the process."""
        match stopped.kind:
            case "time":
                return late(name, limits.seconds, stuck=True)
            case "memory":
                text = f"took more than {self._section.tool_memory} MiB of memory"
            case "output":
                text = f"wrote more than {OUTPUT} MiB"
            case _:
                text = f"ended: its process {stopped}"
        return Outcome(name, shortened(f"Error: {name} {text}", limits.characters), stopped.kind, stuck=True)

    def reward(self, messages: Sequence[Message]) -> tuple[float | None, str]:
        if not self._environment.has_reward:
            return None, ""
        message = {"do": "reward", "messages": [each.as_template() for each in messages]}
        try:
            found = self.ask(message, self._section.tool_seconds)
            match found:
                case None | float():
                    return found, ""
            raise Stopped("died", "answered with something else than a reward")
        except Stopped as stopped:
            # A process that a call ended is counted with that call.
            failure = "" if self._is_counted else _KINDS.get(stopped.kind, stopped.kind)
            return None, failure

    def close(self) -> None:
        self._process.close()


def _folders_of(module: str, name: str) -> list[Path]:
    """The folders of a module's package, or of a module without one. Raises `UserError` if one holds your home."""
    found = sys.modules[module.partition(".")[0]]
    paths = [*getattr(found, "__path__", [])] or [str(Path(str(found.__file__)).parent)]
    folders = [Path(path).resolve() for path in paths]
    for folder in folders:
        if Path.home().resolve().is_relative_to(folder):
            raise UserError(
                f'environment {name}: isolation "process" lets tools read the folder of its module, {folder}, which '
                "holds your home; move the module to a folder of its own"
            )
    return folders


def _not_json(value: object, where: str) -> str:
    """What of a value is no JSON; empty if all is."""
    match value:
        case None | bool() | int() | float() | str():
            return ""
        case list():
            return next(filter(None, (_not_json(each, f"{where}[{n}]") for n, each in enumerate(value))), "")
        case Mapping():
            for key, each in value.items():
                problem = (
                    _not_json(each, f"{where}[{key!r}]")
                    if isinstance(key, str)
                    else f"{where} has the key {key!r} ({type(key).__name__}); expected a text"
                )
                if problem:
                    return problem
            return ""
    return f"{where} is {shown(value)} ({type(value).__name__}); expected values of JSON"


def made(argument: Mapping[str, str]) -> Callable[[], Callable[[Any], object]]:
    """Runs in the process that the others are forks of: imports the environment. Raises `UserError`."""
    environment = EnvironmentClass(argument["target"])
    environment.name = argument["name"]
    return lambda: _Object(environment).answer


class _Object:
    """The object of an episode, in its process."""

    def __init__(self, environment: EnvironmentClass) -> None:
        self._environment = environment
        self._state: Any = None
        self._row: dict[str, object] = {}
        self._source = ""

    def answer(self, message: Mapping[str, Any] | None) -> object:
        """The answer to a message; None to None, the trial of a process."""
        if message is None:
            return None
        try:
            match message["do"]:
                case "begin":
                    return {"found": self._begun(message["row"], message["source"])}
                case "call":
                    return {"found": self._called(message)}
                case _:
                    messages = message["messages"]
                    return {"found": self._environment.score(self._state, messages, self._row, self._source)}
        except UserError as problem:
            limit = _failure_of(problem.__cause__)
            return {"error": str(problem)} if limit == "exception" else {"limit": limit}

    def _begun(self, row: dict[str, object], source: str) -> list[object]:
        self._row, self._source = row, source
        self._state, messages = self._environment.begin(row, source)
        for number, each in enumerate(messages):
            problem = _not_json(each.more, f"message {number}")
            if problem:
                name = self._environment.name
                raise UserError(f'environment {name}: reset: {problem}, for isolation "process"\n    for {source}')
        return [[each.role, each.content, each.weight, dict(each.more)] for each in messages]

    def _called(self, message: Mapping[str, Any]) -> dict[str, object]:
        call = ToolCall(message["name"], message["arguments"])
        outcome = outcome_of(self._environment, self._state, call, _failure_of)
        text, most = outcome.text, message["characters"]
        done = bool(getattr(self._state, "done", False))
        return {"text": text[:most], "length": len(text), "failure": outcome.failure, "done": done}


def _failure_of(problem: BaseException | None) -> str:
    """The kind of failure of what the user's code raised: a limit of the process, or only an exception."""
    if isinstance(problem, MemoryError):
        return "memory"
    is_refused = isinstance(problem, BlockingIOError) and problem.errno == errno.EAGAIN
    return "processes" if is_refused or "can't start new thread" in str(problem) else "exception"
