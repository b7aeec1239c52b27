"""What libraries raise about a model's files, as one line of ours.

Enters: a block in which transformers, tokenizers, safetensors or gguf reads files that anybody may have written.
Leaves: what the block gives, or a `UserError` with what was read and the reason. A damaged file reaches arithmetic,
attributes and look-ups of theirs, so the kinds of errors are many. Left out: our own checks, which come first and say
more.
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
    """Errors of a library leave the block as a `UserError`: "reading: the reason; advice"."""
    try:
        with untyped_as_value_error():
            yield
    except BROKEN as problem:
        raise UserError(f"{reading}: {reason_of(problem)}{f'; {advice}' if advice else ''}") from problem


def reason_of(problem: BaseException) -> str:
    """The reason in one line: the message, after the error's kind where that says what the message leaves out."""
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
