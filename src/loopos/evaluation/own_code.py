"""A user's own function, by the name that a config or a command gives: found, called, and what it returns read.

Enters: "module:function". Leaves: the function, as a call whose errors name it and the row that it was called for; and
the numbers of what it returned, be they Python's, NumPy's or torch's. It runs only where it is named. Left out: what it
is called with (`checkers`, `rewards`, `pair_judges`).
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
"""The largest size of a number that is taken: its square must fit into fp32."""


@dataclass(frozen=True, slots=True)
class OwnFunction:
    """`label`: what it is for, and its name."""

    label: str
    function: Callable[..., Any]

    def __call__(self, *arguments: object, about: str) -> Any:
        """What the function returns; of a generator its list. about: what it is called for, in words. Raises
        `UserError` for whatever the function raises.
        """
        try:
            returned = self.function(*arguments)
            return list(returned) if inspect.isgenerator(returned) else returned
        except UserError:
            raise
        # It is the user's code: anything may rise from it.
        except Exception as problem:
            raise self.error(f"raised {_told(problem)}\n    for {about}") from problem

    def error(self, what: str) -> UserError:
        """A `UserError` that names the function."""
        return UserError(f"{self.label}: {what}")


def own_function(name: str, kind: str) -> OwnFunction:
    """The function of a name "module:function". kind: what it is for, in words. Raises `UserError`."""
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as problem:
        raise UserError(
            f"{kind} {name}: cannot import {module_name} ({problem}); expected a module that Python finds from here: "
            "set PYTHONPATH to its folder"
        ) from problem
    # It is the user's code: anything may rise from it.
    except Exception as problem:
        raise UserError(f"{kind} {name}: importing {module_name} raised {_told(problem)}") from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: {module_name} has no function {function_name}")
    return OwnFunction(f"{kind} {name}", function)


def number_of(value: object) -> float | None:
    """A number of Python, NumPy or torch (an array or a tensor of one element too) as a float; None for anything else,
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


def numbers_of(returned: object, places: Sequence[str], function: OwnFunction) -> list[float]:
    """One number for each of `places`, which name the responses. Raises `UserError`."""
    count, found = len(places), plain(returned)
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
    for value, place in zip(values, places, strict=True):
        number = number_of(value)
        if number is None:
            raise function.error(
                f"returned {_short(value)}; expected a finite number of at most {LARGEST:g} in size\n    for {place}"
            )
        numbers.append(number)
    return numbers


def called_for(prompt: str, source: str = "") -> str:
    """A prompt, and where it is from, for a message."""
    words = f"the prompt {shown(prompt)}"
    return f"{source}, {words}" if source else words


def plain(value: object) -> object:
    """What NumPy's and torch's numbers, arrays and tensors hold, as Python's."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _short(value: object) -> str:
    held = plain(value)
    return str(held) if isinstance(held, Real | Decimal) else shown(held)


def _told(problem: Exception) -> str:
    """An exception in one line, with the place of the code that raised it."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}{place}" + (f": {text}" if text else "")
