"""Format numbers for people, the same way in progress lines, messages and reports.

This module is in `config` because training, evaluation and the command line all use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Second name → first name of metrics that are equal by definition on some tasks: micro F1 with one class per row is
# accuracy, and the validation loss of a classifier without class weights is its log loss.
_SECOND_NAMES = {"micro_f1": "accuracy", "log_loss": "loss"}


def figure(value: float) -> str:
    """Four significant digits; whole numbers without decimals, large ones grouped."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def once(metrics: Mapping[str, Value]) -> dict[str, Value]:
    """The metrics without those whose value is already there under another name."""
    return {name: value for name, value in metrics.items() if not _is_second(name, value, metrics)}


def _is_second(name: str, value: object, metrics: Mapping[str, Value]) -> bool:
    other = metrics.get(_SECOND_NAMES.get(name, ""))
    if not isinstance(value, int | float) or not isinstance(other, int | float):
        return False
    return math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-12)


def as_bytes(count: float) -> str:
    """A count of bytes in a unit that fits, with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def as_time(seconds: float) -> str:
    """Seconds, minutes or hours, as fits."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
