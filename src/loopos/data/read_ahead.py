"""What was read to find the faults of its rows, handed over to the training that reads the same.

Enters: a function that reads, and its arguments. Leaves: its result, for the next call with equal arguments. Rows are
checked before torch is imported, and training asks for them long after: they are read once. Left out: which rows a
config reads (`row_check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class _Reading:
    load: Callable[..., object]
    arguments: tuple[object, ...]
    settings: Mapping[str, object]
    result: Any


_KEPT: ContextVar[list[_Reading] | None] = ContextVar("_KEPT", default=None)


@contextmanager
def reuse_in_training() -> Iterator[None]:
    """Within it, what `read_for_reuse` reads is kept until it is asked for, at the latest until the end."""
    before = _KEPT.set([])
    try:
        yield
    finally:
        _KEPT.reset(before)


def read_for_reuse(load: Callable[Given, Read], *arguments: Given.args, **settings: Given.kwargs) -> Read:
    """Calls `load`, one of the functions that are `reusable`; its next call with the same arguments returns this
    result, within `reuse_in_training`.
    """
    result = load(*arguments, **settings)
    kept = _KEPT.get()
    if kept is not None:
        kept.append(_Reading(load, arguments, settings, result))
    return result


def reusable(load: Callable[Given, Read]) -> Callable[Given, Read]:
    """Lets `load` return what `read_for_reuse` has read, once: the caller may change it."""

    @wraps(load)
    def loaded(*arguments: Given.args, **settings: Given.kwargs) -> Read:
        kept = _KEPT.get() or []
        for index, one in enumerate(kept):
            if (one.load, one.arguments, one.settings) == (loaded, arguments, settings):
                result: Read = kept.pop(index).result
                return result
        return load(*arguments, **settings)

    return loaded
