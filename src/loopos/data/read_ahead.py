"""Reuse what a check has read: training gets the result of the same call.

Rows are checked before torch is imported, long before training needs them; so they are read only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class _Reading:
    load: Callable[..., object]
    arguments: tuple[object, ...]
    settings: Mapping[str, object]
    result: Any


_READINGS: ContextVar[list[_Reading] | None] = ContextVar("_READINGS", default=None)


@contextmanager
def reuse_in_training() -> Iterator[None]:
    """Keep what `read_for_reuse` reads in the block until it is requested, at most until the end."""
    before = _READINGS.set([])
    try:
        yield
    finally:
        _READINGS.reset(before)


def read_for_reuse(load: Callable[Arguments, Read], *arguments: Arguments.args, **settings: Arguments.kwargs) -> Read:
    """Call a `reusable` function; inside `reuse_in_training`, its next equal call returns this result."""
    result = load(*arguments, **settings)
    readings = _READINGS.get()
    if readings is not None:
        readings.append(_Reading(load, arguments, settings, result))
    return result


def reusable(load: Callable[Arguments, Read]) -> Callable[Arguments, Read]:
    """Let `load` return the result of `read_for_reuse` once, because the caller may change it."""

    @wraps(load)
    def loaded(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Read:
        readings = _READINGS.get() or []
        for index, one in enumerate(readings):
            if (one.load, one.arguments, one.settings) == (loaded, arguments, settings):
                result: Read = readings.pop(index).result
                return result
        return load(*arguments, **settings)

    return loaded
