"""A user's own function, named by a config or a command: found, called, and its result converted to numbers.

Errors name the function and the row that it was called for. It runs only if named.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from numbers import Real
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.data.record import shown

LARGEST = 1e18
"""The largest accepted size of a number: its square must fit into fp32."""


@dataclass(frozen=True, slots=True)
class OwnFunction:
    """`label`: its purpose and name."""

    label: str
    function: Callable[..., Any]

    def __call__(self, *arguments: object, about: str) -> Any:
        """The result of the function; for a generator a list. about: describes the call in messages. Raises `UserError`
        for whatever the function raises.
        """
        try:
            returned = self.function(*arguments)
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


def number_of(value: object) -> float | None:
    """A number of Python, NumPy or torch (also an array or a tensor of one element) as a float; None for anything else,
    for NaN, for an infinity, and for one larger than `LARGEST`.
    """
    value = plain(value)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Real | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def numbers_of(returned: object, locations: Sequence[str], function: OwnFunction) -> list[float]:
    """One number for each of `locations`, which describe the responses in messages. Raises `UserError`."""
    count, found = len(locations), plain(returned)
    expected = f"expected one number per response, here a list of {count}"
    if found is None:
        raise function.error(f"returned None; {expected} (is a return missing?)")
    if isinstance(found, Real | Decimal):
        raise function.error(f"returned a single number, {returned}; {expected}")
    if isinstance(found, str | bytes | Mapping | Set) or not isinstance(found, Iterable):
        raise function.error(f"returned {shown(returned)} ({type(returned).__name__}); {expected}")
    values = list(found)
    if len(values) != count:
        raise function.error(f"returned {len(values)} numbers for {count} responses; {expected}")
    numbers: list[float] = []
    for value, location in zip(values, locations, strict=True):
        number = number_of(value)
        if number is None:
            raise function.error(
                f"returned {_short(value)}; expected a finite number of at most {LARGEST:g} in size\n    for {location}"
            )
        numbers.append(number)
    return numbers


def called_for(prompt: str, source: str = "") -> str:
    """A prompt and its source, for a message."""
    text = f"the prompt {shown(prompt)}"
    return f"{source}, {text}" if source else text


def plain(value: object) -> object:
    """Numbers, arrays and tensors of NumPy and torch as Python values."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _short(value: object) -> str:
    converted = plain(value)
    return str(converted) if isinstance(converted, Real | Decimal) else shown(converted)


def _exception_summary(problem: Exception) -> str:
    """An exception on one line, with the location of the code that raised it."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    location = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}{location}" + (f": {text}" if text else "")
