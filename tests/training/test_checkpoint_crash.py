"""A process that is killed at any instant of a save leaves the old or the new checkpoint complete."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loopos.training import checkpoint

# One process pays for importing torch and forks a saver for each order read:
# "loop ROOT FIRST" saves FIRST, FIRST + 1, … until killed; "once ROOT STEP VALUE N" saves one step and dies of its own
# hand right before the N-th change to the file system.
SAVERS = """
import os, sys
from pathlib import Path
import torch
from loopos.training import checkpoint

def save(root, step, value):
    weights = {"a": torch.full((64,), float(value)), "b": torch.full((2, 3), float(value))}
    checkpoint.save(root, step, {"weights": weights}, {"step": step, "value": value})

def loop(root, first):
    step = first
    while True:
        save(root, step, step)
        checkpoint.prune(root, 2, True)
        step += 1

def once(root, step, value, dies_before):
    changes = 0
    def count(event, arguments):
        nonlocal changes
        writes = event == "open" and str(root) in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_CREAT)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            changes += 1
            if changes == dies_before:
                os._exit(9)
    sys.addaudithook(count)
    save(root, step, value)

for line in sys.stdin:
    name, root, *numbers = line.split()
    child = os.fork()
    if child == 0:
        {"loop": loop, "once": once}[name](Path(root), *map(int, numbers))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Savers:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVERS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def start(self, order: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.number()

    def number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    assert " " not in str(path), "an order to the savers is split at blanks"
    return path


@pytest.fixture(scope="module")
def savers() -> Iterator[Savers]:
    savers = Savers()
    yield savers
    assert savers.process.stdin is not None
    assert savers.process.stdout is not None
    savers.process.stdin.close()
    savers.process.wait(timeout=60)
    savers.process.stdout.close()


def check_content(found: checkpoint.Checkpoint, value: float) -> None:
    weights = found.tensors["weights"]
    assert torch.equal(weights["a"], torch.full((64,), value))
    assert torch.equal(weights["b"], torch.full((2, 3), value))


@pytest.mark.slow
def test_killed_at_random_moments_the_newest_is_whole_and_never_older(root: Path, savers: Savers) -> None:
    draw = random.Random(0)
    step = -1
    # At least twelve kills; more if a busy machine finished no save.
    for go in range(200):
        if go >= 12 and step > 0:
            break
        child = savers.start(f"loop {root} {step + 1}")
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert savers.number() == -signal.SIGKILL
        found, summary = checkpoint.newest_whole(root)
        if found is not None:
            assert found.step >= step
            assert found.state == {"step": found.step, "value": found.step}
            check_content(found, found.step)
            step = found.step
        # Only the interrupted save may be incomplete.
        assert not [line for line in summary if "half-written" not in line and "newest whole" not in line]
    assert step > 0


@pytest.mark.parametrize("saved_step", [5, 6], ids=["replacing a step", "saving a new step"])
def test_killed_before_each_change_to_the_disk_leaves_old_or_new(root: Path, savers: Savers, saved_step: int) -> None:
    outcomes = []
    for dies_before in range(1, 40):
        savers.start(f"once {root} 5 1 1000")
        assert savers.number() == 0
        savers.start(f"once {root} {saved_step} 2 {dies_before}")
        code = savers.number()
        found, _ = checkpoint.newest_whole(root)
        assert found is not None
        value = found.state["value"]
        check_content(found, value)
        outcomes.append(value)
        checkpoint.sweep(root)
        remaining, summary = checkpoint.newest_whole(root)
        assert remaining is not None
        assert remaining.state["value"] == value
        assert summary == []
        for entry in root.glob("step-00000006"):
            os.rename(entry, root.parent / f"taken-{dies_before}")
        if code == 0:
            break
    # Old up to some change, new from there on, and the last run was not killed at all.
    assert code == 0
    assert len(outcomes) > 5
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
