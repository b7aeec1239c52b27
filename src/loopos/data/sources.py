"""Resolve the value of `data.training_data` to files, a saved data set or a hub id, without opening anything.

In a folder, files whose names contain a split (train, validation, test ...) are used only for that split, so that a
folder with train.csv and test.csv never trains on its test rows.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError
from loopos.config.paths import ENVIRONMENT_ROWS, TASKS
from loopos.data.decoding import require_regular
from loopos.data.record import file_error, shown

FileFormat: TypeAlias = Literal["csv", "tsv", "json", "jsonl", "txt", "parquet", "arrow", "xlsx"]
_FORMATS: dict[str, FileFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".xlsx": "xlsx",
}
_COMPRESSIBLE = ("csv", "tsv", "json", "jsonl", "txt")
FORMATS_EXPECTED = ".csv, .tsv, .json, .jsonl, .txt (also .gz or .zst), .parquet, .arrow or .xlsx"
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_MOST_SUBFOLDERS = 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Location:
    """What a source is: `files` with their formats, the path of a `saved` data set, the id of one on the `hub`, or a
    `task` of reasoning-gym or of an environment.
    """

    kind: Literal["files", "saved", "hub", "task"]
    name: str
    files: tuple[tuple[str, FileFormat], ...] = ()
    summary: tuple[str, ...] = field(default=())


def locate(source: str, split: str) -> Location:
    """Finds what `source` names.

    Args:
        source: a file, a folder of files, a folder written by `save_to_disk`, a glob, a hub id "org/name", or a
            task "reasoning-gym:NAME" or "environment:NAME".
        split: which files of a folder count, where their names say it.
    Raises:
        DataError: nothing there (with the names that come near), or nothing that can be read.
    """
    if not source.strip():
        raise file_error("data", "an empty path", "a file, a folder, a glob or a hub id")
    if os.path.isdir(source):
        return _folder(source, split)
    if os.path.exists(source):
        require_regular(source)
        return Location("files", source, ((source, file_format(source)),))
    if os.path.isfile(sheet_of(source)[0]):
        return Location("files", source, ((source, "xlsx"),))
    if source.startswith((TASKS, ENVIRONMENT_ROWS)):
        return Location("task", source)
    if glob.has_magic(source):
        return _glob(source)
    if is_hub_id(source):
        return Location("hub", source)
    raise _missing(source)


def sheet_of(source: str) -> tuple[str, str | None]:
    """The spreadsheet that "FILE.xlsx#SHEET" names, and the sheet in it; any other source, and None."""
    file, mark, sheet = source.partition(".xlsx#")
    return (f"{file}.xlsx", sheet) if mark and sheet else (source, None)


def is_hub_id(source: str) -> bool:
    """Whether a name that is no path here reads as a hub id: "org/name", no folder `org`, no data file's suffix."""
    organization = source.partition("/")[0]
    return bool(_HUB_ID.fullmatch(source)) and not os.path.exists(organization) and _format_of(source) is None


def file_format(path: str) -> FileFormat:
    """The format that a file's name states.

    Raises:
        DataError: no known suffix, or compression on a format that has its own.
    """
    found = _format_of(path)
    if found is None:
        suffix = "".join(Path(path).suffixes[-2:])
        raise file_error(
            path,
            f"the suffix {shown(suffix)}" if suffix else "a file without a suffix",
            FORMATS_EXPECTED,
            "name the file after its content, or convert it",
            field="file name",
        )
    return found


def _format_of(path: str) -> FileFormat | None:
    name = Path(path).name.lower()
    stem, suffix = os.path.splitext(name)
    if suffix in (".gz", ".zst"):
        inner = _FORMATS.get(os.path.splitext(stem)[1])
        return inner if inner in _COMPRESSIBLE else None
    return _FORMATS.get(suffix)


def _folder(folder: str, split: str) -> Location:
    names = sorted(os.listdir(folder))
    if "state.json" in names or "dataset_dict.json" in names:
        return Location("saved", folder)
    paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in paths if os.path.isfile(path) and _format_of(path) is not None]
    below = _patterns_below(paths)
    if not files:
        kinds = ", ".join(shown(name) for name in names[:8]) if names else "nothing"
        hint = f"subfolders are not read; to read those files, give {' or '.join(below)}" if below else ""
        raise file_error(
            folder, f"a folder that holds {kinds}", f"files named {FORMATS_EXPECTED}", hint, field="folder"
        )
    summary = [f"{folder}: files in subfolders are not read; {' or '.join(below)} would read them"] if below else []
    if len(files) < len(paths):
        others = [os.path.basename(path) for path in paths if path not in files]
        summary.append(f"{folder}: not read: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}")
    expected = _SPLIT_NAMES.get(split, split)
    splits = {path: _split_of(path) for path in files}
    if any(splits.values()):
        chosen = [path for path in files if splits[path] == expected]
        if not chosen:
            found = ", ".join(sorted({name for name in splits.values() if name}))
            raise file_error(
                folder,
                f"the split {shown(split)}",
                f"one of the splits that its file names state: {found}",
                "set data.training_split or data.validation_split, or name one file",
                field="split",
            )
        summary.append(f"{folder}: for the split {split}: {', '.join(os.path.basename(path) for path in chosen)}")
        files = chosen
    return Location("files", folder, tuple((path, file_format(path)) for path in files), tuple(summary))


def _patterns_below(paths: Sequence[str]) -> list[str]:
    """The globs that read the data files in subfolders, one for each kind of file; few folders are looked into."""
    found: dict[str, None] = {}
    for folder in [path for path in paths if os.path.isdir(path)][:_MOST_SUBFOLDERS]:
        for path, _, names in itertools.islice(os.walk(folder), _MOST_SUBFOLDERS):
            kinds = {os.path.splitext(name)[1] for name in names if _format_of(name) is not None}
            above = os.path.dirname(folder)
            found |= {repr(os.path.join(above, "**", f"*{kind}")): None for kind in sorted(kinds) if path}
    return list(found)


def _split_of(path: str) -> str | None:
    for part in re.split(r"[^a-z]+", os.path.basename(path).lower()):
        if part in _SPLIT_NAMES:
            return _SPLIT_NAMES[part]
    return None


def _glob(pattern: str) -> Location:
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise file_error(pattern, "a pattern that no file matches", "at least one file", "quote the pattern in a shell")
    return Location("files", pattern, tuple((path, file_format(path)) for path in files))


def _common_glob(paths: Sequence[str]) -> str:
    """A glob that matches all these files, and perhaps others."""
    folder = os.path.commonpath([os.path.dirname(path) or "." for path in paths]) if len(paths) > 1 else ""
    suffixes = {os.path.splitext(path)[1] for path in paths}
    return os.path.join("" if folder == "." else folder, f"*{suffixes.pop()}" if len(suffixes) == 1 else "*")


def _missing(source: str) -> DataError:
    folder = os.path.dirname(source) or "."
    parts = [part.strip() for part in re.split(r"[,;]\s*|\s+", source) if part.strip()]
    if len(parts) > 1 and all(os.path.exists(part) for part in parts):
        hint = f"one source is read: a folder or a glob, such as {_common_glob(parts)!r}"
    elif not os.path.isdir(folder):
        hint = f"there is no folder {folder!r}"
    else:
        near = difflib.get_close_matches(os.path.basename(source), sorted(os.listdir(folder)), n=3, cutoff=0.6)
        named = " or ".join(repr(os.path.join(os.path.dirname(source), name)) for name in near)
        hint = f"did you mean {named}?" if near else f"paths are relative to {os.getcwd()!r}"
    return file_error(
        source,
        "a path that does not exist",
        f'a file ({FORMATS_EXPECTED}), a folder, a glob or a hub id "org/name"',
        hint,
    )
