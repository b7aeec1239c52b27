"""Command output: aligned tables for people, one JSON value for scripts.

Plain text without box drawing reads the same on a terminal, in a file and in a pipe.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from loopos.config.diagnostics import printable
from loopos.config.figures import figure
from loopos.storage.json_files import json_text


def say(text: str = "") -> None:
    """Prints `text` to standard output; control characters are shown, not interpreted."""
    typer.echo(printable(text))


def say_json(value: object) -> None:
    """Prints `value` as JSON to standard output; nan and infinity, which JSON lacks, become null."""
    typer.echo(json_text(_finite(value), allow_nan=False, indent=2))


def json_lines(values: Iterable[object]) -> str:
    """The values as JSON Lines."""
    return "".join(json_text(value) + "\n" for value in values)


def write(text: str) -> None:
    """Writes `text` to standard output at once, without a newline; on a terminal control characters are shown."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def table(rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), indent: str = "  ") -> str:
    """`rows` as aligned columns: numbers right-aligned, everything else left-aligned."""
    lines = [[shown(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    whole = [list(head), *lines] if head else lines
    widths = [max(len(line[column]) for line in whole) for column in range(len(whole[0]))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(widths))]
    return "\n".join(
        (
            indent
            + "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            )
        ).rstrip()
        for line in whole
    )


def confusion_table(class_names: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """A confusion matrix with the true class in rows; columns show class numbers to stay narrow."""
    lines = [["true class", "", *(str(number) for number in range(len(class_names)))]]
    for number, (name, counts) in enumerate(zip(class_names, matrix, strict=True)):
        lines.append([name, str(number), *(str(count) if count else "·" for count in counts)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def shown(value: object) -> str:
    """A table cell: floats with four significant digits, integers with thousands separators, empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figure(value)
    return str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: object) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
