"""Append-only JSON Lines that several processes and threads write: what `append` returned from is on disk.

The log itself is locked (flock) for the time of an append, so nothing stays behind when a process dies. A line that a
killed process left incomplete was never acknowledged; the next process that locks the log removes it. torch is not
imported. Apart from `events`, whose log has one writer and is not flushed at each event.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopos.config.diagnostics import UserError
from loopos.storage.durable import append_whole, end_of_last_line, explain_disk_full, fsync_path, names_file

NOT_RECORDED = "nothing was recorded: {remedy}, then try again"


class SharedLog:
    """A log at `path`, which is created if it is missing. `torn_bytes` counts what was removed from incomplete lines,
    `num_opened` how often the file was opened: once more if another file took its name.

    Raises `StorageError` where the file system refuses, and `UserError` where it has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.torn_bytes, self.num_opened = path, 0, 0
        self._descriptor, self._pid, self._depth = -1, 0, 0
        self._thread = threading.RLock()
        self._open()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the log for the block, against other processes and threads; a thread may enter again."""
        if self._pid != os.getpid():
            # A forked child shares the parent's open file, and so its lock: it needs an open file of its own.
            self._thread, self._depth, self._descriptor = threading.RLock(), 0, -1
            self._open()
        with self._thread:
            if self._depth == 0:
                self._lock()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def append(self, line: bytes) -> int:
        """Append a whole line, flush it to disk, and return its position. Raises `StorageError`: nothing is recorded
        then.
        """
        assert line.endswith(b"\n"), "a line ends with a newline"
        with self.locked(), explain_disk_full(self.path, len(line), "a line", NOT_RECORDED):
            start = self.size()
            append_whole(self._descriptor, line)
            try:
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, start)
                raise
            return start

    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, start: int = 0) -> bytes:
        """The whole lines from the position `start` on."""
        with self.locked(), names_file(self.path):
            parts, position, end = [], start, self.size()
            while position < end:
                parts.append(os.pread(self._descriptor, end - position, position))
                assert parts[-1], f"{self.path} became shorter while it was locked"
                position += len(parts[-1])
            return b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        with explain_disk_full(self.path, 0, "the log", NOT_RECORDED):
            is_new = not self.path.exists()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._pid, self.num_opened = os.getpid(), self.num_opened + 1
            if is_new:
                fsync_path(self.path.parent)

    def _lock(self) -> None:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            except OSError as problem:
                raise UserError(
                    f"{self.path}: this file system has no locks ({problem.strerror}); expected one on which several "
                    "processes can append; move the folder to a local disk"
                ) from problem
            if self.path.exists() and os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                break
            # The file was replaced, for example by a backup: the lock is of a file without a name.
            self.close()
            self._open()
        try:
            self._repair()
        except BaseException:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            raise

    def _repair(self) -> None:
        """Ends the last line. No writer is active: this process has the lock."""
        size = self.size()
        if size == 0 or os.pread(self._descriptor, 1, size - 1) == b"\n":
            return
        start = end_of_last_line(self._descriptor, size)
        try:
            json.loads(os.pread(self._descriptor, size - start, start))
        except (ValueError, RecursionError):
            self.torn_bytes += size - start
            os.ftruncate(self._descriptor, start)
        else:
            # A whole value is never the beginning of a torn one: an editor left out the last newline.
            append_whole(self._descriptor, b"\n")
