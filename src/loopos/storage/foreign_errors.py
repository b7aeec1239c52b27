"""What libraries written in Rust raise, as Python's own kinds of errors.

Enters: an exception of safetensors, tokenizers or another package with such a core: an `Exception` of no class of its
own, with the system's error number in its text. Leaves: an `OSError`, or a `ValueError` with the same words. Left out:
what is told to the user.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

_NUMBERED = re.compile(r"\(os error (\d+)\)|\bos error (\d+)\b")
# A panic of Rust's: it is no `Exception`, and its class cannot be imported.
_PANIC = "PanicException"


def is_bare(problem: BaseException) -> bool:
    """Whether an exception has no class that says what it is."""
    return type(problem) is Exception or type(problem).__name__ == _PANIC


def os_error_of(problem: BaseException, path: str) -> OSError | None:
    """The `OSError` on `path` that a library wrapped into text; None for any other exception."""
    if not (is_bare(problem) or isinstance(problem, SafetensorError)):
        return None
    found = _NUMBERED.search(str(problem))
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), path)


@contextmanager
def bare_as_value_error() -> Iterator[None]:
    """An exception of no class of its own leaves the block as a `ValueError` with the same words."""
    try:
        yield
    # pyo3's PanicException is a BaseException alone; all but bare ones rise on.
    except BaseException as problem:
        if is_bare(problem):
            raise ValueError(str(problem) or _PANIC) from problem
        raise
