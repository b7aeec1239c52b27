"""Values and tables of a report in Markdown.

Enters: values. Leaves: text. Left out: what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loopos.config.figures import figure


def number(value: object) -> float | None:
    """A number, or the text that stands for nan or inf in JSON; None for all else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """A value on one line of a table."""
    return " ".join(str(value).replace("|", "\\|").split())


def shown(value: float) -> str:
    """A number with four significant digits."""
    return figure(value)
