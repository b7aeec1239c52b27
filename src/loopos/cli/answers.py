"""Command output: aligned tables for people, one JSON value for scripts, and files of rows (JSON Lines, CSV or TSV),
which are written completely or not at all.

Plain text without box drawing reads the same on a terminal, in a file and in a pipe.
"""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from loopos.config.diagnostics import UserError, printable
from loopos.config.figures import figure
from loopos.storage.durable import require_writable
from loopos.storage.json_files import json_text

ROW_FORMATS = ("jsonl", "csv", "tsv")


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


def output_format(output: Path | None, requested: str | None) -> str:
    """The requested format, else the one of the output's suffix, else JSON Lines. Raises `UserError`."""
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    found = requested or {"ndjson": "jsonl"}.get(suffix, suffix) or ROW_FORMATS[0]
    if found not in ROW_FORMATS:
        got = f"--format: got {requested}" if requested else f"--output: got the suffix .{suffix}"
        raise UserError(f"{got}; expected one of {', '.join(ROW_FORMATS)}")
    return found


def as_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a user's file as table cells: lists and objects as JSON."""
    return {name: json_text(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """An output row as table cells: a column `probability_CLASS` for each class of "probabilities", `NAME_KEY` for each
    key of another object; a list as one cell, its items separated by |.
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities":
            flat |= {f"probability_{each}": probability for each, probability in value.items()}
        elif isinstance(value, Mapping):
            flat |= {f"{name}_{each}": number for each, number in value.items()}
        elif isinstance(value, list):
            flat[name] = "|".join(map(str, value))
        else:
            flat[name] = value
    return flat


def rendered(rows: Sequence[Mapping[str, Any]], file_format: str) -> str:
    """The rows as text, one per line; a table has the columns of all rows, in order of appearance."""
    if file_format == "jsonl":
        return json_lines(rows)
    flat = [flat_row(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    written = io.StringIO()
    writer = csv.DictWriter(written, names, delimiter="," if file_format == "csv" else "\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return written.getvalue()


def refuse_unwritable(path: Path, option: str = "--output", *, source: str | None = None) -> None:
    """Raises `UserError` for a file that cannot be written: before the work, not after it."""
    if source is not None and path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        raise UserError(f"{option}: got {path}, which is the input; expected another file")
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a file")
    if not folder.is_dir():
        raise UserError(f"{option}: {path}: there is no folder {folder}; create it, or use another path")
    require_writable("data.output_dir", folder)


def write_whole(path: Path, text: str, option: str = "--output") -> None:
    """Writes a file completely or not at all. Raises `UserError` if the folder is missing or not writable."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        # If nothing can be written, nothing can be removed either, and nothing was left behind.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{option}: {path}: cannot be written ({error.strerror}); use another path") from error
