"""Convert exceptions of Rust-based libraries (safetensors, tokenizers) to Python's exceptions.

Such a library raises a plain `Exception` with the system's error number in its text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_NUMBERED = re.compile(r"\(os error (\d+)\)|\bos error (\d+)\b")
# A Rust panic: not a subclass of `Exception`, and its class cannot be imported.
_PANIC = "PanicException"


def is_untyped(problem: BaseException) -> bool:
    """Whether an exception has no class of its own."""
    return type(problem) is Exception or type(problem).__name__ == _PANIC


def os_error_of(problem: BaseException, path: str) -> OSError | None:
    """The `OSError` on `path` that a library turned into text; None for any other exception."""
    if not (is_untyped(problem) or isinstance(problem, SafetensorError)):
        return None
    found = _NUMBERED.search(str(problem))
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), path)


@contextmanager
def untyped_as_value_error() -> Iterator[None]:
    """Turn an exception without a class of its own into a `ValueError` with the same message."""
    try:
        yield
    # pyo3's PanicException derives only from BaseException; other exceptions are raised again.
    except BaseException as problem:
        if is_untyped(problem):
            raise ValueError(str(problem) or _PANIC) from problem
        raise
