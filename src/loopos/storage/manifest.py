"""The manifest of a model's folder: what its files were when they were saved.

    loopos-manifest.json   {"files": {"model.safetensors": {"sha256": "…", "size": 1234}}, "format": 1, "sha256": "…"}

Enters: a folder that is written, or opened. Leaves: its manifest, or an error that names the file that is no longer
what was saved. Every file that opening a model may read is in it; documents for people (*.md, *.svg) and the recipe are
not. A folder without a manifest, of an older version or another program, is taken as it is. Left out: checkpoints of a
run, whose manifest is their own (`training.checkpoint_folder`).
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
    """Whether a manifest holds a file of this name."""
    return name not in (MANIFEST, RECIPE) and not name.startswith(".") and not name.endswith(_DOCUMENTS)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Name → size and SHA-256 of the files in a folder that a manifest holds; those of folders in it are left out."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and is_covered(entry.name))
    return {file.name: hash_file(file) for file in files}


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of a folder; without records there is none."""
    if records:
        files = {name: asdict(record) for name, record in records.items()}
        save_json(folder / MANIFEST, {"format": _FORMAT, "files": files, "sha256": _digest(files)})


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """What the manifest of a folder holds; nothing where there is none. Raises `UserError` for one that is broken."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    advice = "restore it from a copy, or delete it to open the folder without a check of its files"
    manifest = read_object(path, advice=advice)
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: expected format {_FORMAT}, got {manifest.get('format')}; {advice}")
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("sha256") != _digest(files):
        raise UserError(f"{path}: damaged: its own SHA-256 is another; {advice}")
    try:
        found = {name: FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: expected a size and a SHA-256 for each file; {advice}") from problem
    if outside := [name for name in found if Path(name).name != name]:
        raise UserError(f"{path}: names {outside[0]}; expected files beside it; {advice}")
    return found


def check_manifest(folder: Path, *, of: Callable[[str], bool] = lambda name: True) -> None:
    """Raises `UserError` for a file that is not what the folder's manifest says, or is missing. of: which names are
    looked at. Within a process a file is read once, as long as its size, time and inode stay.
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
                wrong = "its SHA-256 is not the one it was saved with"
            else:
                wrong = f"{found.st_size:,} bytes; it was saved with {record.size:,}"
        except OSError as problem:
            raise UserError(f"{file}: cannot be read: {problem.strerror}; {MANIFEST} names it") from problem
        raise UserError(
            f"{file}: damaged or changed: {wrong}; restore it from a copy or make the folder again; if you changed it "
            f"on purpose, delete {MANIFEST} beside it"
        )


@contextmanager
def checked_meanwhile(folder: Path, *, of: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """`check_manifest`, of weights in a thread while the block reads them: hashing takes a third of the time that
    opening a model takes. Damage that is found then comes before what the block raises of it.
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
    """Whether a file of this name holds weights."""
    return name.endswith(_WEIGHTS)


def _digest(files: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, key: tuple[int, ...]) -> str:
    # The key tells one state of the file from another.
    return hash_file(file).sha256
