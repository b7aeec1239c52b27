"""Runs that are killed: a forked process ended by SIGKILL at a chosen moment."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm.std import tqdm

NUM_KILLS = int(os.environ.get("LOOPOS_TEST_KILLS", "5"))


def in_a_child(work: Callable[[], object], kill_after: float | None) -> int | None:
    """Does `work` in a forked process; kills it after so many seconds. The exit status, or None if killed."""
    # What the parent holds must not be collected in the child: native objects, such as a session of onnxruntime, wait
    # there for threads that a fork does not copy.
    gc.freeze()
    child = os.fork()
    if child != 0:
        gc.unfreeze()
    else:
        status = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 2)
            # The lock of progress bars is shared with this process's parent: killed with it, it would stop the parent.
            tqdm.set_lock(threading.RLock())
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code
        time.sleep(0.002)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_kills_leave_no_trace(
    train: Callable[[], object],
    run: Path,
    bits_of: Callable[[Path], Mapping[str, str]],
    expected: Mapping[str, str],
    *,
    kills: int,
    seconds: float,
    latest: float,
    seed: str,
) -> None:
    """Kills `train`, which resumes `run`, at random moments up to the share `latest` of the `seconds` that it takes in
    whole; then lets it end, and asserts that `bits_of(run)` are those of a run that nobody killed.
    """
    draw, killed = random.Random(seed), 0
    while killed < kills:
        if in_a_child(train, draw.uniform(0.05, latest) * seconds) is None:
            killed += 1
        else:
            # It came to its end before its kill: the next run starts over, so that every kill hits a run at work.
            assert bits_of(run) == expected
            shutil.rmtree(run)
    assert in_a_child(train, None) == 0
    assert bits_of(run) == expected
