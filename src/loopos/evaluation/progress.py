"""How long work tells how far it is.

Left out: drawing bars (`cli.bar`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int, str], None]
"""Told of progress: parts done, parts in all, the name of the one that is next."""


def silent(done: int, total: int, name: str) -> None:
    """Tells nobody."""
