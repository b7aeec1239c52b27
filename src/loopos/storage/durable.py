"""Durable writing: bytes enter, leave as files that survive a crash at any instant, hashed on the way.

A full disk becomes one `DiskFull` line. Left out: what the bytes mean (`tensor_format.py`, `training.checkpoint`,
`training.events`), folders (`whole_folder.py`); nothing here imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loopos.config.faults import UserError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

RESUME = "what was saved before is whole: free some space, then continue with --resume"
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(UserError):
    """The disk, or the user's quota of it, is full; what was being written is not there, what was there before is."""

    exit_code = 74


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file's content."""

    size: int
    sha256: str


@contextmanager
def disk_full_said(folder: Path, needed_bytes: int, what: str, advice: str = RESUME) -> Iterator[None]:
    """Turn "no space left" (ENOSPC, EDQUOT) inside the block into a `DiskFull` that gives needed and free bytes, and
    says what to do.

    Every other `OSError` passes through unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL_CODES:
            raise
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free_bytes = shutil.disk_usage(existing).free
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        raise DiskFull(
            f"{folder}: {reason}: {what} needs {needed_bytes:,} bytes, {free_bytes:,} are free; {advice}"
        ) from error


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a new file and fsync it; returns its size in bytes. Raises `FileExistsError` if it is there already."""
    size = 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """`write_new`, hashed in the same pass."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    size = write_new(path, hashed())
    return FileRecord(size=size, sha256=digest.hexdigest())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it, at once and durably: a crash at any instant leaves the old one or the new one. Its
    mode is the umask's. Raises `OSError`; the old file is whole then.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_place(path.parent)


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it lies on the disk, read once in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def fsync_place(place: Path) -> None:
    """Make a file's content durable, or the names inside a folder: a rename survives a power cut only after this."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
