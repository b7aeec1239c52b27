"""Runs in several processes: one start of Python for any number of runs, one after another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loopos

# A run a line: mode, method, config, whether it is resumed.
RUNS = """
import json, sys
from loopos.methods.table import config_classes, method_class
from loopos.training.progress import RunProgress

for line in sys.stdin:
    mode, method, config, resume = json.loads(line)
    chosen, trainer = config_classes()[mode, method].model_validate(config), method_class(mode, method)
    # Drawing takes ten times a pico run's time.
    vars(sys.modules[trainer.__module__])["write_report"] = lambda folder: None
    trainer(chosen, progress=RunProgress(quiet=True), trust_remote_code=False, environment={}).train(resume=resume)
"""


def run_world(size: int, runs: Sequence[tuple[Any, bool]]) -> None:
    """Runs (config, resumed or not) in `size` processes, to the end."""
    processes = start_world(size, runs)
    errors = []
    for process in processes:
        with process:
            assert process.stderr is not None
            errors.append(process.stderr.read()[-3000:])
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)


def start_world(size: int, runs: Sequence[tuple[Any, bool]]) -> list[subprocess.Popen[str]]:
    """The processes of `run_world`, at work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [str(Path(loopos.__file__).parents[1]), str(Path(__file__).parent / "methods")]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
    }
    lines = "".join(
        json.dumps([c.computation.mode, c.computation.method, c.model_dump(mode="json"), resume]) + "\n"
        for c, resume in runs
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUNS],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(lines)
        process.stdin.close()
    return processes
