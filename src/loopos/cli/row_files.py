"""Output files of rows: JSON Lines, CSV or TSV, written completely or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loopos.cli.answers import json_lines
from loopos.config.diagnostics import UserError
from loopos.storage.durable import require_writable
from loopos.storage.json_files import json_text

FORMATS = ("jsonl", "csv", "tsv")


def output_format(output: Path | None, requested: str | None) -> str:
    """The requested format, else the one of the output's suffix, else JSON Lines. Raises `UserError`."""
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    found = requested or {"ndjson": "jsonl"}.get(suffix, suffix) or FORMATS[0]
    if found not in FORMATS:
        got = f"--format: got {requested}" if requested else f"--output: got the suffix .{suffix}"
        raise UserError(f"{got}; expected one of {', '.join(FORMATS)}")
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
    table = csv.DictWriter(written, names, delimiter="," if file_format == "csv" else "\t", lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
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
