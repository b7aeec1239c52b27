"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int, str], None]
"""Called with the numbers of finished parts and of all, and the name of the next part."""


def silent(completed: int, total: int, name: str) -> None:
    """Ignores progress."""
