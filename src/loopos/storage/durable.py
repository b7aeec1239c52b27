"""Durable file writing: files survive a crash at any instant and are hashed while they are written.

A full disk raises `DiskFull`; any other refusal of the file system raises a `StorageError` that names the file.
`require_writable` checks a folder by writing to it: permission bits do not show a read-only disk. torch is not
imported.
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

_CHUNK_BYTES = 65536
RESUME = "earlier checkpoints are intact: {remedy}, then continue with --resume"
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    errno.EIO: "check the disk",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "change the permissions",
    errno.EPERM: "change the permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
}
# Errors of open files (read, write, fsync), which carry no file name.
_OF_OPEN_FILES = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG, errno.EMFILE, *_DISK_FULL_CODES})


class StorageError(UserError):
    """The file system refused to read or write; the old content is intact, the new content is not there."""

    exit_code = 74


class DiskFull(StorageError):
    """The disk or the user's quota is full."""


def is_of_files(error: OSError) -> bool:
    """Whether an `OSError` is of the file system rather than of the network or a hub."""
    if error.errno is None or isinstance(error, ConnectionError):
        return False
    return error.filename is not None or error.errno in _OF_OPEN_FILES


def describe_os_error(error: OSError, source: str | Path = "a file") -> str:
    """A file system error as text: its file, or `source` if it names none, and the reason."""
    path = source if error.filename is None else os.fsdecode(error.filename)
    return f"{path}: {error.strerror or type(error).__name__}"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file's content."""

    size: int
    sha256: str


@contextmanager
def explain_disk_full(folder: Path, needed_bytes: int, what: str, advice: str = RESUME) -> Iterator[None]:
    """Turn file system errors inside the block into errors for the user.

    "No space left" (ENOSPC, EDQUOT) becomes a `DiskFull` with needed and free bytes, any other error of the file system
    a `StorageError` that names the file. `advice` says what to do, with {remedy} for what must be fixed first. Network
    errors pass through.
    """
    try:
        yield
    except OSError as error:
        if not is_of_files(error):
            raise
        if error.errno not in _DISK_FULL_CODES:
            remedy = advice.format(remedy=_REMEDIES.get(error.errno or 0, "fix this"))
            raise StorageError(f"{describe_os_error(error, folder)} (while writing {what}); {remedy}") from error
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free_bytes = shutil.disk_usage(existing).free
        reason = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        raise DiskFull(
            f"{folder}: {reason}: {what} needs {needed_bytes:,} bytes, {free_bytes:,} are free; "
            f"{advice.format(remedy='free some space')}"
        ) from error


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Add the file name to an `OSError` that has none: a failed write or fsync only knows a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def append_whole(descriptor: int, content: bytes) -> None:
    """Append to an open file: all of `content`, or nothing where writing fails. Raises `OSError`."""
    start = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def end_of_last_line(descriptor: int, size: int) -> int:
    """Position behind the last newline in the first `size` bytes of an open file; 0 without one."""
    end = size
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a new file and fsync it; returns its size in bytes. Raises `FileExistsError` if the file exists."""
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


def write_whole(path: Path, content: bytes | Iterable[bytes], *, partial: Path | None = None) -> None:
    """Write or replace a file atomically and durably: a crash leaves the old file or the new one.

    partial: a file on the same file system that is written first; by default one beside `path` that has the process's
    number. The mode follows the umask. Raises `OSError`; the old file is then intact.
    """
    partial = partial or path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with names_file(path), partial.open("wb") as file:
            for chunk in (content,) if isinstance(content, bytes) else content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    # Ctrl-C, too, must leave no temporary file.
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file on disk, read once in chunks."""
    with names_file(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def fsync_path(path: Path) -> None:
    """fsync a file or a folder; a rename survives a power cut only after its folder is synced."""
    with names_file(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(key: str, folder: Path) -> None:
    """Raise `SettingError` if `folder` cannot be created or written to; `key` is the setting that names it."""
    above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".loopos-", dir=above))
    except OSError as problem:
        raise SettingError(
            key, f"{above} is not writable ({problem.strerror}); choose another folder than {folder}"
        ) from problem
