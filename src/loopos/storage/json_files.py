"""Read and write JSON files. Configs are parsed by `config.json_text`, which keeps line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopos.config.diagnostics import UserError, printable_json
from loopos.storage.durable import write_whole


def json_text(
    content: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    allow_nan: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """JSON with non-ASCII letters as they are, but control characters and lone surrogates escaped.

    So every text can be encoded, and a line stays one line for every reader.
    """
    text = json.dumps(
        content, indent=indent, sort_keys=sort_keys, allow_nan=allow_nan, separators=separators, ensure_ascii=False
    )
    # Newlines of an indented text are between values; those inside strings are already escaped.
    return printable_json(text)


def save_json(path: Path, content: object) -> None:
    """Write indented JSON with sorted keys and a final newline, atomically."""
    write_whole(path, (json_text(content, indent=2, sort_keys=True) + "\n").encode())


def read_object(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file; `advice` says what to do about a broken file.

    Raises `UserError` if the file is missing, is not JSON or is not an object.
    """
    suffix = f"; {advice}" if advice else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}{suffix}") from problem
    except ValueError as problem:
        raise UserError(f"{path}: broken: {problem}{suffix}") from problem
    except RecursionError as problem:
        raise UserError(f"{path}: broken: nested too deeply{suffix}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path}: broken: not a JSON object{suffix}")
    return content
