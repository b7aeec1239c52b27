"""Write rows held in Python (dicts, a DataFrame or a `datasets.Dataset`) to a source that `rows.read` opens.

The result is a JSON Lines file, or the data set's own folder, which keeps class names. The name contains a digest of
the rows, so that equal rows are written once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.storage.durable import explain_disk_full, write_whole
from loopos.storage.hub import quiet_datasets
from loopos.storage.whole_folder import remove, whole_folder

_DIGITS = 12
_BATCH = 1000


@runtime_checkable
class SavesItself(Protocol):
    """A `datasets.Dataset`."""

    def save_to_disk(self, dataset_path: str) -> None: ...


@runtime_checkable
class Frame(Protocol):
    """A pandas DataFrame."""

    def to_json(self, path_or_buf: Any, *, orient: str, lines: bool, force_ascii: bool) -> Any: ...


InMemoryRows: TypeAlias = Iterable[Mapping[str, object]] | SavesItself | Frame


def are_rows(value: object) -> bool:
    """Whether the value of a config's key that names rows is rows, and not the name of a source."""
    return value is not None and not isinstance(value, str | os.PathLike | bool | int | float)


def written(rows: object, folder: Path, name: str) -> Path:
    """Writes the rows into `folder` under `name` and their digest, where they are not there yet, and returns the
    source. Raises `DataError` for a row that is no mapping or that JSON cannot hold, `DiskFull`.
    """
    if isinstance(rows, Mapping):
        splits = ", ".join(map(str, list(rows)[:5]))
        got = f"a {type(rows).__name__} with the keys {splits}"
        raise DataError([Diagnostic(name, None, None, "", got, "rows: a list of dicts, a DataFrame or a Dataset")])
    if isinstance(rows, SavesItself):
        return _written_dataset(rows, folder, name)
    if isinstance(rows, Frame):
        content = str(rows.to_json(None, orient="records", lines=True, force_ascii=False)).encode()
    elif isinstance(rows, Iterable):
        content = b"".join(_line(row, number, name) for number, row in enumerate(rows))
    else:
        got = f"{type(rows).__name__} {rows!r:.80}"
        raise DataError([Diagnostic(name, None, None, "", got, "rows: a list of dicts, a DataFrame or a Dataset")])
    file = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:_DIGITS]}.jsonl"
    if not file.exists():
        with explain_disk_full(folder, len(content), "the rows"):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
    return file


def remove_written(folder: Path, name: str) -> None:
    """Removes what `written` left under `name`."""
    for path in folder.glob(f"{name}-{'?' * _DIGITS}*"):
        remove(path)


def _written_dataset(rows: Any, folder: Path, name: str) -> Path:
    digest = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(batch_size=_BATCH):
        digest.update(json.dumps(table.to_pylist(), default=repr).encode())
    path = folder / f"{name}-{digest.hexdigest()[:_DIGITS]}"
    if not path.exists():
        with explain_disk_full(folder, 1, "the rows"):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_folder(path) as partial, quiet_datasets():
                rows.save_to_disk(str(partial))
    return path


def _line(row: object, number: int, name: str) -> bytes:
    if not isinstance(row, Mapping):
        got = f"{type(row).__name__} {row!r:.80}"
        raise DataError([Diagnostic(f"{name} (row {number})", None, None, "", got, "a dict of column to value")])
    try:
        return (json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        message = f"a value that JSON does not hold: {error}"
        raise DataError([Diagnostic(f"{name} (row {number})", None, None, "", message, "")]) from error
