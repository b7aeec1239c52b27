"""A lock file that lets only one process write to a folder at a time.

    run.lock   {"pid": 1234, "host": "node3", "since": 1790000000.0}

The lock is an flock, which the system releases when a process dies. The owner also touches the file every few seconds
(heartbeat), for what flock does not cover: hosts that do not share locks, and file systems without locks. torch is not
imported.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loopos.config.diagnostics import UserError

LOCK = "run.lock"
BEAT = 5.0
"""Seconds between two heartbeats of the owner of a lock."""
SILENCE = 15.0
"""Seconds without a heartbeat after which an owner that flock does not cover counts as dead."""

# Inspecting a lock takes it for an instant; several tries tell this apart from an owner.
_TRIES, _BETWEEN_TRIES = 10, 0.05
_MOST_BYTES = 4096
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that owns a lock, or owned it last. `pid` is 0 if the record cannot be read."""

    pid: int
    host: str
    since: float

    def __str__(self) -> str:
        if self.pid == 0:
            return "another process"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


@dataclass(frozen=True, slots=True)
class LockState:
    """State of a lock file. `is_active`: the owner runs; otherwise it ended without releasing the lock."""

    holder: Holder
    is_active: bool


class FolderBusy(UserError):
    """Another process writes into the folder."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        super().__init__(
            f"{folder} is in use by {holder}: only one run may write there at a time; wait until it ends, or choose "
            "another folder"
        )


@dataclass
class _Lock:
    """A lock of this process; `depth` counts nested entries of the owning thread."""

    descriptor: int
    thread: int
    stopped: threading.Event
    beats: threading.Thread | None = None
    depth: int = 1


_locks: dict[Path, _Lock] = {}


@contextmanager
def only_writer(folder: Path, *, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Lock a folder for the block; create it if needed, and remove it again if it is still empty at the end.

    A thread may enter a folder again that it has locked. `note` receives messages about a file system without locks and
    about waiting. Raises `FolderBusy`, or `UserError` if the folder is not writable.
    """
    path = folder.resolve()
    lock = _locks.get(path)
    if lock is not None:
        if lock.thread != threading.get_ident():
            raise FolderBusy(folder, _read(path / LOCK))
        lock.depth += 1
        try:
            yield
        finally:
            lock.depth -= 1
        return
    was_there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK).exists() and not (folder / LOCK).is_file():
            raise UserError(f"{folder / LOCK}: expected a regular file; move it away")
        lock = _take(folder, note)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: not writable: {problem.strerror}; choose another folder") from problem
    _locks[path] = lock
    try:
        yield
    finally:
        _release(path, lock)
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def lock_state(folder: Path) -> LockState | None:
    """The state of a folder's lock; None if there is no lock. Nothing is written."""
    file = folder / LOCK
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # No lock file, or this user may not read it.
        return None
    try:
        holder = _read(file)
        if folder.resolve() in _locks:
            return LockState(holder, True)
        is_free = _try(descriptor, fcntl.LOCK_SH)
        age = time.time() - os.fstat(descriptor).st_mtime
        if is_free is False:
            return LockState(holder, True)
        return LockState(holder, age < SILENCE and (is_free is None or holder.host != socket.gethostname()))
    finally:
        os.close(descriptor)


def refuse_busy(folder: Path) -> None:
    """Raise `FolderBusy` if another process has locked the folder; does not lock it."""
    state = lock_state(folder)
    if state is not None and state.is_active and folder.resolve() not in _locks:
        raise FolderBusy(folder, state.holder)


def _take(folder: Path, note: Callable[[str], None]) -> _Lock:
    file = folder / LOCK
    descriptor = _locked(file)
    has_locks = descriptor is not None
    try:
        if descriptor is None:
            note(f"{folder}: this file system has no locks (flock): a second run is only noticed by its heartbeat")
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        before = _read(file)
        if (
            before.pid
            and not (has_locks and before.host == socket.gethostname())
            and _has_heartbeat(folder, before, note)
        ):
            raise FolderBusy(folder, before)
        record = Holder(os.getpid(), socket.gethostname(), time.time())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(record)).encode(), 0)
    # Ctrl-C, too, must release the lock.
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    lock = _Lock(descriptor, threading.get_ident(), threading.Event())
    lock.beats = threading.Thread(target=_beat, args=(descriptor, lock.stopped), name="run.lock", daemon=True)
    lock.beats.start()
    return lock


def _locked(file: Path) -> int | None:
    """Lock the file and return its descriptor; None on a file system without locks. Raises `FolderBusy`."""
    for _ in range(_TRIES):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_free = _try(descriptor, fcntl.LOCK_EX)
        # The previous owner may have unlinked the file meanwhile; then the lock is of a file without a name.
        if is_free and file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)
        if is_free is None:
            return None
        time.sleep(_BETWEEN_TRIES)
    raise FolderBusy(file.parent, _read(file))


def _try(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was acquired; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            return None
        raise
    return True


def _release(path: Path, lock: _Lock) -> None:
    if _locks.get(path) is not lock:
        # In a forked child, which owns no locks.
        return
    lock.stopped.set()
    if lock.beats is not None:
        lock.beats.join()
    del _locks[path]
    # Unlink while the lock is active: a waiting process then sees that its file has no name and tries again.
    with suppress(FileNotFoundError):
        (path / LOCK).unlink()
    os.close(lock.descriptor)


def _read(file: Path) -> Holder:
    """The record in a lock file; pid 0 if there is none or it is being written."""
    try:
        # Non-blocking, in case the name is a pipe.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            record = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        finally:
            os.close(descriptor)
        return Holder(int(record["pid"]), str(record["host"]), float(record["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder(0, "", 0.0)


def _beat(descriptor: int, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT):
        # A file system that is unavailable for a while must not stop the run.
        with suppress(OSError):
            os.utime(descriptor)


def _has_heartbeat(folder: Path, before: Holder, note: Callable[[str], None]) -> bool:
    """Whether an owner that flock does not cover sends a heartbeat before it counts as dead."""
    file = folder / LOCK
    seen = file.stat().st_mtime
    left = SILENCE - (_time_there(folder) - seen)
    if left <= 0:
        return False
    note(f"{folder}: the last process to write there was {before}; waiting up to {left:.0f} s for its heartbeat")
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(min(0.5, left))
        # Reopen: a network file system then asks its server for the modification time.
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mtime != seen:
                return True
    return False


def _time_there(folder: Path) -> float:
    """The current time on the file system's clock."""
    probe = folder / f".clock.partial-{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _forget_in_child() -> None:
    # A forked child owns no locks: its copies of the descriptors would keep a lock alive after the owner ends.
    for lock in _locks.values():
        os.close(lock.descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_in_child)
