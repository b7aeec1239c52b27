"""JSON files, out and in.

Enters: a value, or a file. Leaves: the file, readable, or the object in it. Left out: configs, whose faults need a
place (`config.json_text`).
"""

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
    """JSON as LoopOS writes it: letters as they are, but control characters and halves of a character escaped, so that
    every text has bytes and a line stays one line for all who read it.
    """
    text = json.dumps(
        content, indent=indent, sort_keys=sort_keys, allow_nan=allow_nan, separators=separators, ensure_ascii=False
    )
    # The line ends of an indented text stand between values; those inside strings are escaped already.
    return printable_json(text)


def save_json(path: Path, content: object) -> None:
    """Writes JSON with sorted keys, readable, with a last line end; the file is whole or not there."""
    write_whole(path, (json_text(content, indent=2, sort_keys=True) + "\n").encode())


def read_object(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file. advice: what the user may do about a broken one. Raises `UserError` for a file that is
    missing, no JSON, or no object.
    """
    after = f"; {advice}" if advice else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}{after}") from problem
    except ValueError as problem:
        raise UserError(f"{path}: broken: {problem}{after}") from problem
    except RecursionError as problem:
        raise UserError(f"{path}: broken: nested too deeply{after}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path}: broken: no JSON object{after}")
    return content
