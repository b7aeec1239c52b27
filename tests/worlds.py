"""Runs in several processes, which a fork of the test's own process starts at no cost."""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from forked import Child

from loopos.config.methods import method_row
from loopos.training.progress import RunProgress


def start_processes(size: int, work: Callable[[], object]) -> list[Child]:
    """`size` processes of one group that do `work`, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def alone() -> None:
        # As in a process of its own: what torch warns of there is no error.
        warnings.simplefilter("default")
        work()

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [Child(alone, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def run_processes(size: int, work: Callable[[], object], *, seconds: float = 300.0) -> None:
    """Does `work` in `size` processes, to the end; where one fails the others are killed."""
    with ExitStack() as stack:
        processes = [stack.enter_context(each) for each in start_processes(size, work)]
        limit = time.monotonic() + seconds
        while any(each.poll() is None for each in processes) and time.monotonic() < limit:
            if any(each.returncode for each in processes):
                # The others notice, and may say why.
                limit = min(limit, time.monotonic() + 10)
            time.sleep(0.002)
        found = [each.returncode for each in processes]
        assert found == [0] * size, "\n".join(each.errors[-3000:] for each in processes)


def train_here(config: Any, *, resume: bool = False) -> None:
    """A run without its report: drawing takes ten times a pico run's time."""
    trainer = method_row(config.computation.method).trainer_class
    with patch("loopos.methods.base.write_report"):
        trainer(config, progress=RunProgress(quiet=True), trust_remote_code=False, environment={}).train(resume=resume)


def _train_all(runs: Sequence[tuple[Any, bool]]) -> None:
    for config, resume in runs:
        train_here(config, resume=resume)


def run_world(size: int, runs: Sequence[tuple[Any, bool]]) -> None:
    """Runs (config, resumed or not), one after another, in `size` processes, to the end."""
    run_processes(size, lambda: _train_all(runs))


def start_world(size: int, runs: Sequence[tuple[Any, bool]]) -> list[Child]:
    """The processes of `run_world`, at work."""
    return start_processes(size, lambda: _train_all(runs))
