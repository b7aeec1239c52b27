"""Runs that are killed: a forked process ended by SIGKILL at a chosen moment."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from forked import Child

NUM_KILLS = int(os.environ.get("LOOPOS_TEST_KILLS", "3"))


def in_a_child(work: Callable[[], object], kill_after: float | None) -> int | None:
    """Does `work` in a forked process; kills it after so many seconds. The exit status, or None if killed."""
    with Child(work) as child:
        code = child.wait(None if kill_after is None else time.monotonic() + kill_after)
        if code is not None:
            return code
        child.kill()
        code = child.wait()
    return None if code == -signal.SIGKILL else code


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
    """Kills `train`, which resumes `run`, at random moments up to the fraction `latest` of its full duration `seconds`; then lets it end, and asserts that `bits_of(run)` are those of a run that nobody killed."""
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
