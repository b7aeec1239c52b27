"""Durable writing: bytes enter, leave as files that survive a crash at any instant, hashed on the way.

A full disk becomes one `DiskFull` line, any other refusal of the file system one `StorageError` line that names its
file. Left out: what the bytes mean (`tensor_format.py`, `training.checkpoint`, `training.events`), folders
(`whole_folder.py`); nothing here imports torch.

Whether a folder can be written, found out by writing: permissions do not tell of a read-only disk, of /proc, or of
what an administrator may not do either.

Enters: a folder, there or not. Leaves: nothing, or the error that names it. Left out: how much room there is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loopos.config.diagnostics import SettingError, UserError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

RESUME = "what was saved before is whole: {remedy}, then continue with --resume"
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    errno.EIO: "check the disk",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "change the permissions",
    errno.EPERM: "change the permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
}
# Errors that are about files even where they name none: a read, a write or an fsync of an open one.
_OF_OPEN_FILES = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG, errno.EMFILE, *_DISK_FULL_CODES})


class StorageError(UserError):
    """The file system refused to write or to read; what was being written is not there, what was there before is."""

    exit_code = 74


class DiskFull(StorageError):
    """The disk, or the user's quota of it, is full."""


def is_of_files(error: OSError) -> bool:
    """Whether an error is one of the file system, and not of a network or a hub, whose errors are an `OSError` too."""
    if error.errno is None or isinstance(error, ConnectionError):
        return False
    return error.filename is not None or error.errno in _OF_OPEN_FILES


def run_summary(error: OSError, source: str | Path = "a file") -> str:
    """An error of the file system in words: the file, or `place` where it names none, and the reason."""
    path = source if error.filename is None else os.fsdecode(error.filename)
    return f"{path}: {error.strerror or type(error).__name__}"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file's content."""

    size: int
    sha256: str


@contextmanager
def explain_disk_full(folder: Path, needed_bytes: int, what: str, advice: str = RESUME) -> Iterator[None]:
    """Turn "no space left" (ENOSPC, EDQUOT) inside the block into a `DiskFull` that gives needed and free bytes, and
    any other error of the file system into a `StorageError` that names the file. advice: what to do, with the place
    {remedy} for what must be mended first.

    Errors of a network pass through unchanged.
    """
    try:
        yield
    except OSError as error:
        if not is_of_files(error):
            raise
        if error.errno not in _DISK_FULL_CODES:
            remedy = advice.format(remedy=_REMEDIES.get(error.errno or 0, "mend this"))
            raise StorageError(f"{run_summary(error, folder)} (while writing {what}); {remedy}") from error
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free_bytes = shutil.disk_usage(existing).free
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        raise DiskFull(
            f"{folder}: {reason}: {what} needs {needed_bytes:,} bytes, {free_bytes:,} are free; "
            f"{advice.format(remedy='free some space')}"
        ) from error


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Gives an `OSError` that passes through the block the file that it is about, where it names none: a write or an
    fsync that fails knows a descriptor only.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a new file and fsync it; returns its size in bytes. Raises `FileExistsError` if it is there already."""
    size = 0
    with names_file(path), path.open("xb") as file:
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
        with names_file(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    # Ctrl-C too must leave nothing beside the file.
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_place(path.parent)


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it lies on the disk, read once in pieces."""
    with names_file(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def fsync_place(path: Path) -> None:
    """Make a file's content durable, or the names inside a folder: a rename survives a power cut only after this."""
    with names_file(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(key: str, folder: Path) -> None:
    """Raises `SettingError` where `folder` cannot be made or written. key: the setting that names it."""
    above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".loopos-", dir=above))
    except OSError as problem:
        raise SettingError(
            key, f"nothing can be written in {above} ({problem.strerror}); name another place than {folder}"
        ) from problem
