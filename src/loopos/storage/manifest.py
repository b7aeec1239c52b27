"""The manifest of a model folder: size and SHA-256 of its files when they were saved.

    loopos-manifest.json   {"files": {"model.safetensors": {"sha256": "…", "size": 1234}}, "format": 1, "sha256": "…"}

It lists every file that opening a model may read; documents (*.md, *.svg) and the recipe are not listed. A folder
without a manifest (older version, other program) is accepted unchecked. Checkpoints have their own manifest
(`training.checkpoint_files`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.config.paths import MANIFEST, RECIPE
from loopos.storage.durable import FileRecord, hash_file
from loopos.storage.json_files import read_object, save_json

_FORMAT = 1
_DOCUMENTS = (".md", ".svg")
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def is_covered(name: str) -> bool:
    """Whether a manifest lists a file of this name."""
    return name not in (MANIFEST, RECIPE) and not name.startswith(".") and not name.endswith(_DOCUMENTS)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Name → size and SHA-256 of the files of a folder that its manifest lists, without subfolders."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and is_covered(entry.name))
    return {file.name: hash_file(file) for file in files}


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder; without records, write none."""
    if records:
        files = {name: asdict(record) for name, record in records.items()}
        save_json(folder / MANIFEST, {"format": _FORMAT, "files": files, "sha256": _digest(files)})


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The records of a folder's manifest; empty if there is none. Raises `UserError` if it is broken."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    advice = "restore it from a copy, or delete it to open the folder without a check of its files"
    manifest = read_object(path, advice=advice)
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: expected format {_FORMAT}, got {manifest.get('format')}; {advice}")
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("sha256") != _digest(files):
        raise UserError(f"{path}: damaged: its own SHA-256 does not match; {advice}")
    try:
        found = {name: FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: expected a size and a SHA-256 for each file; {advice}") from problem
    if outside := [name for name in found if Path(name).name != name]:
        raise UserError(f"{path}: names {outside[0]}; expected files beside it; {advice}")
    return found


def check_manifest(folder: Path, *, of: Callable[[str], bool] = lambda name: True) -> None:
    """Raise `UserError` if a file is missing or differs from the manifest; `of` selects the names to check.

    A process hashes a file only once, as long as its size, times and inode stay the same.
    """
    for name, record in read_manifest(folder).items():
        if not of(name):
            continue
        file = folder / name
        try:
            found = file.stat()
            if found.st_size == record.size:
                key = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
                if _sha256(file.absolute(), key) == record.sha256:
                    continue
                wrong = "its SHA-256 differs from the saved one"
            else:
                wrong = f"{found.st_size:,} bytes; it was saved with {record.size:,}"
        except OSError as problem:
            raise UserError(f"{file}: cannot be read: {problem.strerror}; {MANIFEST} lists it") from problem
        raise UserError(
            f"{file}: damaged or changed: {wrong}; restore it from a copy or make the folder again; if you changed it "
            f"on purpose, delete {MANIFEST} beside it"
        )


@contextmanager
def checked_meanwhile(folder: Path, *, of: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """`check_manifest`, with weights hashed in a thread while the block reads them.

    Hashing takes a third of the time of opening a model. Damage is reported before any error that it causes in the
    block.
    """
    check_manifest(folder, of=lambda name: of(name) and not is_weights(name))
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_manifest, folder, of=lambda name: of(name) and is_weights(name))
        try:
            yield
        except UserError:
            checked.result()
            raise
        checked.result()


def is_weights(name: str) -> bool:
    """Whether a file of this name contains weights."""
    return name.endswith(_WEIGHTS)


def _digest(files: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, key: tuple[int, ...]) -> str:
    # The key identifies one state of the file.
    return hash_file(file).sha256
