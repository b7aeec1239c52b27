"""One writer at a time: live, killed and forked processes, and hosts without shared locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopos.storage import folder_lock
from loopos.storage.folder_lock import LOCK, FolderBusy, lock_state, only_writer, refuse_busy

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@contextmanager
def another_process(folder: Path, *, forks: bool = False) -> Iterator[int]:
    """A process that holds the folder until it is killed. forks: and has a child, which outlives it."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(folder):
            if forks and os.fork() == 0:
                os.write(say, b"x")
                time.sleep(5)
                os._exit(0)
            if not forks:
                os.write(say, b"x")
            time.sleep(30)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(say)


def write_record(folder: Path, host: str) -> Path:
    file = folder / LOCK
    file.write_text(json.dumps({"pid": 4000000, "host": host, "since": 0.0}))
    return file


def test_the_second_process_names_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with another_process(tmp_path) as other:
        for _ in range(2):
            with pytest.raises(FolderBusy, match=f"in use by process {other} on {socket.gethostname()}, since 20"):
                only_writer(tmp_path).__enter__()
        with pytest.raises(FolderBusy):
            refuse_busy(tmp_path)
        state = lock_state(tmp_path)
        assert state is not None
        assert (state.is_active, state.holder.pid) == (True, other)
    state = lock_state(tmp_path)
    assert state is not None
    assert (state.is_active, state.holder.pid) == (False, other)
    refuse_busy(tmp_path)
    with only_writer(tmp_path):
        is_locked = lock_state(tmp_path)
        assert is_locked is not None
        assert (is_locked.is_active, is_locked.holder.pid) == (True, os.getpid())
    assert lock_state(tmp_path) is None


def test_a_child_of_the_holder_does_not_hold_on(tmp_path: Path) -> None:
    with another_process(tmp_path, forks=True), pytest.raises(FolderBusy):
        only_writer(tmp_path).__enter__()
    # The holder is killed, its child lives on.
    with only_writer(tmp_path):
        pass


def test_a_thread_may_enter_what_it_holds_and_no_other_thread(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with only_writer(tmp_path):
                pass
        except FolderBusy as problem:
            refused.append(str(problem))

    with only_writer(tmp_path):
        with only_writer(tmp_path / "." / "x" / ".."):
            pass
        assert (tmp_path / LOCK).is_file()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} on" in refused[0]


def test_an_empty_folder_that_the_lock_made_does_not_stay(tmp_path: Path) -> None:
    with only_writer(tmp_path / "deep" / "run"):
        pass
    assert not (tmp_path / "deep" / "run").exists()
    with only_writer(tmp_path / "deep" / "run"):
        (tmp_path / "deep" / "run" / "file").touch()
    assert [entry.name for entry in (tmp_path / "deep" / "run").iterdir()] == ["file"]


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
def test_a_process_on_another_host_is_recognized_by_its_heartbeat(
    lives: bool, has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "SILENCE", 0.8)
    if not has_locks:

        def flock(descriptor: int, kind: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    file, notes = write_record(tmp_path, "another-host"), list[str]()
    beats = threading.Timer(0.2, lambda: os.utime(file))
    if lives:
        beats.start()
        with pytest.raises(FolderBusy, match="process 4000000 on another-host"):
            only_writer(tmp_path, note=notes.append).__enter__()
        beats.join()
    else:
        with only_writer(tmp_path, note=notes.append):
            pass
    assert sum("waiting up to 1 s for its heartbeat" in note for note in notes) == 1
    assert sum("has no locks (flock)" in note for note in notes) == (not has_locks)


def test_an_old_record_of_another_host_is_not_waited_for(tmp_path: Path) -> None:
    os.utime(write_record(tmp_path, "another-host"), (0, 0))
    began = time.monotonic()
    with only_writer(tmp_path):
        pass
    assert time.monotonic() - began < folder_lock.SILENCE / 3


def test_the_owner_of_a_lock_sends_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.01)
    with only_writer(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0
