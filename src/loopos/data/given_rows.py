"""Rows that a Python program holds → a source that `rows.read` opens.

Enters: dicts, a pandas DataFrame or a `datasets.Dataset`, and a folder. Leaves: a JSON Lines file, or the data set's
own folder, whose names of classes stay. Left out: what the columns mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from loopos.config.faults import DataError, Fault


@runtime_checkable
class SavesItself(Protocol):
    """A `datasets.Dataset`."""

    def save_to_disk(self, dataset_path: str) -> None: ...


@runtime_checkable
class Frame(Protocol):
    """A pandas DataFrame."""

    def to_json(self, path_or_buf: Any, *, orient: str, lines: bool, force_ascii: bool) -> Any: ...


GivenRows: TypeAlias = Iterable[Mapping[str, object]] | SavesItself | Frame


def written(rows: GivenRows, folder: Path, name: str) -> str:
    """Writes the rows under `name` in `folder`, over what is there by that name, and returns the source. Raises
    `DataError` for a row that is no mapping or that JSON cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, SavesItself):
        rows.save_to_disk(str(folder / name))
        return str(folder / name)
    file = folder / f"{name}.jsonl"
    if isinstance(rows, Frame):
        rows.to_json(file, orient="records", lines=True, force_ascii=False)
        return str(file)
    lines = [_line(row, number, name) for number, row in enumerate(rows)]
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def _line(row: object, number: int, name: str) -> str:
    if not isinstance(row, Mapping):
        got = f"{type(row).__name__} {row!r:.80}"
        raise DataError([Fault(f"{name} (row {number})", None, None, "", got, "a dict of column to value")])
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        sentence = f"a value that JSON does not hold: {error}"
        raise DataError([Fault(f"{name} (row {number})", None, None, "", sentence, "")]) from error
