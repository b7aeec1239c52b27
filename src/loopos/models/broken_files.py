"""Turns the errors of libraries that read model files into one-line `UserError`s.

A damaged file can reach arithmetic, attributes and look-ups in transformers, tokenizers, safetensors or gguf, so many
kinds of errors are caught. LoopOS's own checks come first and are more specific.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from loopos.config.diagnostics import UserError
from loopos.storage.foreign_errors import untyped_as_value_error

BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    EOFError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def broken_as_user_error(reading: str, *, advice: str = "") -> Iterator[None]:
    """Raises errors of a library as `UserError`: "reading: the reason; advice"."""
    try:
        with untyped_as_value_error():
            yield
    except BROKEN as problem:
        raise UserError(f"{reading}: {reason_of(problem)}{f'; {advice}' if advice else ''}") from problem


def reason_of(problem: BaseException) -> str:
    """The reason in one line: the message, preceded by the error's kind if the message alone is unclear."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, StrictDataclassError):
        return " ".join(str(problem).split())
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    if isinstance(problem, KeyError):
        return f"unknown or missing: {lines[0]}"
    if isinstance(problem, AttributeError | ArithmeticError | TypeError | IndexError | AssertionError):
        return f"a value of another kind or size than expected ({type(problem).__name__}: {lines[0]})"
    return lines[0]
