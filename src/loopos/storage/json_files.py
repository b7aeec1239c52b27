"""JSON files, out and in.

Enters: a value, or a file. Leaves: the file, readable, or the object in it. Left out: configs, whose faults need a
place (`config.json_text`); durability (`durable.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopos.config.faults import UserError
from loopos.storage.durable import names_file


def save_json(path: Path, content: object) -> None:
    """Writes JSON with sorted keys, readable, with a last line end."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with names_file(path):
        path.write_text(text, encoding="utf-8")


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
