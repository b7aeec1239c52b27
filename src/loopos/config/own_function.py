"""A user's own function, named by a config or a command: found and called.

Errors name the function and what it was called for. It runs only if named.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loopos.config.diagnostics import UserError


@dataclass(frozen=True, slots=True)
class OwnFunction:
    """`label`: its purpose and name."""

    label: str
    function: Callable[..., Any]

    def __call__(self, *arguments: object, about: str, **named: object) -> Any:
        """The result of the function; for a generator a list. about: describes the call in messages. Raises `UserError`
        for whatever the function raises.
        """
        try:
            returned = self.function(*arguments, **named)
            return list(returned) if inspect.isgenerator(returned) else returned
        except UserError:
            raise
        # The user's code may raise anything.
        except Exception as problem:
            raise self.error(f"raised {_exception_summary(problem)}\n    for {about}") from problem

    def error(self, what: str) -> UserError:
        """A `UserError` that names the function."""
        return UserError(f"{self.label}: {what}")


def own_function(name: str, kind: str) -> OwnFunction:
    """The function called "module:function". kind: its purpose, for messages. Raises `UserError`."""
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as problem:
        raise UserError(
            f"{kind} {name}: cannot import {module_name} ({problem}); expected a module that Python can find: "
            "set PYTHONPATH to its folder"
        ) from problem
    # The user's code may raise anything.
    except Exception as problem:
        raise UserError(f"{kind} {name}: importing {module_name} raised {_exception_summary(problem)}") from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: {module_name} has no function {function_name}")
    return OwnFunction(f"{kind} {name}", function)


def _exception_summary(problem: Exception) -> str:
    """An exception on one line, with the location of the code that raised it."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    location = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}{location}" + (f": {text}" if text else "")
