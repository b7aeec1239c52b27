"""Answers on standard output: aligned tables for people, one JSON value for scripts.

Enters: rows of values, or a JSON value. Leaves: text. Plain text and no box drawing, so that an answer reads the same
on a terminal, in a file and in a pipe.
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
    """`text` on standard output; control characters in it are shown, not obeyed."""
    typer.echo(printable(text))


def say_json(value: object) -> None:
    """`value` as JSON on standard output; nan and infinity, which JSON lacks, become null."""
    typer.echo(json_text(_finite(value), allow_nan=False, indent=2))


def json_lines(values: Iterable[object]) -> str:
    """The values as JSON Lines."""
    return "".join(json_text(value) + "\n" for value in values)


def write(text: str) -> None:
    """`text` on standard output at once, without a line end: as it is into a file or pipe, as `say` on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def table(rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), indent: str = "  ") -> str:
    """`rows` as aligned columns: numbers to the right, all else to the left."""
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
    """Counts with the true class in rows; columns are the predicted classes, by number to stay narrow."""
    lines = [["true class", "", *(str(number) for number in range(len(class_names)))]]
    for number, (name, counts) in enumerate(zip(class_names, matrix, strict=True)):
        lines.append([name, str(number), *(str(count) if count else "·" for count in counts)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def shown(value: object) -> str:
    """A cell: four significant digits of a float, whole numbers grouped, nothing for None."""
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
