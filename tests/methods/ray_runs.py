"""Runs whose responses come from real workers of Ray, each run in a process of its own; one worker may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUN = """
import json, os, re, signal, sys
from loopos.config.ppo import PpoConfig
from loopos.rl.workers import opening
from loopos.rl.workers.ray_transport import RayTransport
from loopos.methods.ppo import PpoTrainer
from loopos.training.progress import RunProgress

config, killed_at = PpoConfig.model_validate(json.loads(sys.argv[1])), int(sys.argv[2])


class Killing(RayTransport):
    processes, orders, held = {}, 0, []

    def events(self, seconds):
        self.held += super().events(seconds)
        for event in self.held:
            if hasattr(event, "where"):
                self.processes[event.worker] = int(re.match(r"process (\\d+)", event.where)[1])
        if killed_at and len(self.processes) < 2:
            # Both workers are there before the first order: else the first one answers all of them.
            return []
        found, self.held = self.held, []
        return found

    def submit(self, worker, order):
        # Stopped before the order is sent, so that it dies with the order; killed right after, because the run may be
        # over in less than a second: another worker takes an order that is late.
        self.orders += 1
        if self.orders == killed_at:
            os.kill(self.processes[worker], signal.SIGSTOP)
        super().submit(worker, order)
        if self.orders == killed_at:
            os.kill(self.processes[worker], signal.SIGKILL)


class Spoken(RunProgress):
    def say(self, *sentences):
        print(*sentences, sep="\\n", flush=True)

    warn = say


opening.RayTransport = Killing
PpoTrainer(config, progress=Spoken(quiet=True)).train()
"""


def run_with_ray(config: Any, *, killed_at: int = 0, fails: bool = False) -> list[str]:
    """The messages of the run, or with `fails` of its error. killed_at: the order whose worker is killed while it has
    it; 0 kills none.
    """
    return ran(RUN, [json.dumps(config.model_dump(mode="json")), str(killed_at)], environment_of(), fails=fails)


def environment_of() -> dict[str, str]:
    """One thread, and the tests' modules beside LoopOS's."""
    here = Path(__file__).parent
    places = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}


def ran(script: str, arguments: Sequence[str], environment: Mapping[str, str], *, fails: bool = False) -> list[str]:
    """The lines that a script prints in a process of its own, which must succeed, or those of its error."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return (done.stderr if fails else done.stdout).splitlines()
