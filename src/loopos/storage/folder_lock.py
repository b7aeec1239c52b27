"""One writer at a time in a folder.

    run.lock   {"pid": 1234, "host": "node3", "since": 1790000000.0}

Enters: a folder. Leaves: the folder, held by this process until it lets go or ends, or a `FolderBusy` that names the
process that holds it. The system keeps the lock (flock), so that a process that was killed holds nothing, whatever
file it left. While a lock is held its file shows a sign of life every few seconds, for what flock does not reach: hosts
whose locks do not reach one another, and file systems without locks. Left out: what is written. torch is not imported.
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
"""Seconds between two signs of life of whoever holds a folder."""
SILENCE = 15.0
"""Seconds without one after which a process that cannot be seen otherwise counts as gone."""

# A look at a lock holds it for an instant: several tries tell that from a process that holds it.
_TRIES, _BETWEEN_TRIES = 10, 0.05
_MOST_BYTES = 4096
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a folder, or held it last. `pid` is 0 where its record cannot be read."""

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
    """What a lock's file says. `is_held`: its holder runs; otherwise it ended without letting go."""

    holder: Holder
    is_held: bool


class FolderBusy(UserError):
    """Another process writes into the folder."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        super().__init__(
            f"{folder} is in use by {holder}: one run writes there at a time; wait until it has ended, or choose "
            "another folder"
        )


@dataclass
class _Held:
    """A lock of this process. `depth`: how often the thread that holds it has entered."""

    descriptor: int
    thread: int
    stopped: threading.Event
    beats: threading.Thread | None = None
    depth: int = 1


_held: dict[Path, _Held] = {}


@contextmanager
def only_writer(folder: Path, *, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Holds a folder, made if it is not there, until the block ends; a thread may enter again what it holds. A folder
    that this made and that is empty in the end is removed. note: receives a sentence about a file system without locks,
    and one before a wait.

    Raises `FolderBusy`, and `UserError` for a folder that cannot be written.
    """
    path = folder.resolve()
    held = _held.get(path)
    if held is not None:
        if held.thread != threading.get_ident():
            raise FolderBusy(folder, _read(path / LOCK))
        held.depth += 1
        try:
            yield
        finally:
            held.depth -= 1
        return
    was_there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK).exists() and not (folder / LOCK).is_file():
            raise UserError(f"{folder / LOCK}: expected a file of the run; move it away")
        held = _take(folder, note)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: cannot be written: {problem.strerror}; choose another folder") from problem
    _held[path] = held
    try:
        yield
    finally:
        _let_go(path, held)
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def lock_state(folder: Path) -> LockState | None:
    """Who holds a folder, or held it and ended without letting go; None where nobody does. Nothing is written."""
    file = folder / LOCK
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # None there, or none that this user may look at.
        return None
    try:
        holder = _read(file)
        if folder.resolve() in _held:
            return LockState(holder, True)
        is_free = _try(descriptor, fcntl.LOCK_SH)
        age = time.time() - os.fstat(descriptor).st_mtime
        if is_free is False:
            return LockState(holder, True)
        return LockState(holder, age < SILENCE and (is_free is None or holder.host != socket.gethostname()))
    finally:
        os.close(descriptor)


def refuse_busy(folder: Path) -> None:
    """Raises `FolderBusy` where another process holds the folder; takes nothing."""
    state = lock_state(folder)
    if state is not None and state.is_held and folder.resolve() not in _held:
        raise FolderBusy(folder, state.holder)


def _take(folder: Path, note: Callable[[str], None]) -> _Held:
    file = folder / LOCK
    descriptor = _locked(file)
    has_locks = descriptor is not None
    try:
        if descriptor is None:
            note(
                f"{folder}: this file system has no locks (flock): a second run there is noticed by signs of life only"
            )
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        before = _read(file)
        if before.pid and not (has_locks and before.host == socket.gethostname()) and _shows_life(folder, before, note):
            raise FolderBusy(folder, before)
        mine = Holder(os.getpid(), socket.gethostname(), time.time())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)
    # Ctrl-C too must not leave the lock held.
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    held = _Held(descriptor, threading.get_ident(), threading.Event())
    held.beats = threading.Thread(target=_beat, args=(descriptor, held.stopped), name="run.lock", daemon=True)
    held.beats.start()
    return held


def _locked(file: Path) -> int | None:
    """A descriptor of the lock's file that holds it; None on a file system without locks. Raises `FolderBusy`."""
    for _ in range(_TRIES):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_free = _try(descriptor, fcntl.LOCK_EX)
        # Whoever held it has removed the file while this process waited: the lock is that of a file without a name.
        if is_free and file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)
        if is_free is None:
            return None
        time.sleep(_BETWEEN_TRIES)
    raise FolderBusy(file.parent, _read(file))


def _try(descriptor: int, kind: int) -> bool | None:
    """Whether the lock could be had; None where there are none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            return None
        raise
    return True


def _let_go(path: Path, held: _Held) -> None:
    if _held.get(path) is not held:
        # In a forked child, which holds nothing.
        return
    held.stopped.set()
    if held.beats is not None:
        held.beats.join()
    del _held[path]
    # Removed while it is held: whoever waits for it finds that its file has no name any more, and tries again.
    with suppress(FileNotFoundError):
        (path / LOCK).unlink()
    os.close(held.descriptor)


def _read(file: Path) -> Holder:
    """The record in a lock's file; without a process where there is none, or it is being written."""
    try:
        # Not blocked by something else of this name, such as a pipe.
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
        # A file system that is away for a while does not end the run here.
        with suppress(OSError):
            os.utime(descriptor)


def _shows_life(folder: Path, before: Holder, note: Callable[[str], None]) -> bool:
    """Whether the process of a record that flock cannot speak for shows a sign of life before it counts as gone."""
    file = folder / LOCK
    seen = file.stat().st_mtime
    left = SILENCE - (_time_there(folder) - seen)
    if left <= 0:
        return False
    note(f"{folder}: the last process to write there was {before}; waiting up to {left:.0f} s for a sign of its life")
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(min(0.5, left))
        # Opened anew: a network file system then asks its server for the time of the last change.
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mtime != seen:
                return True
    return False


def _time_there(folder: Path) -> float:
    """The present by the clock that the folder's files are stamped by."""
    probe = folder / f".clock.partial-{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _forget_in_child() -> None:
    # A forked child holds nothing: with its copies of the descriptors a lock would outlive the process that took it.
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
