"""`loopos train --nproc`: several processes of one machine, and how all of them end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Child
from pico_runs import slow_but

from loopos.cli.commands import app

WORDS = ("lamp", "river", "stone", "cloud", "green", "seven")


def config_of(tmp_path: Path, pico_folder: Path, **training: Any) -> Path:
    rows = [{"text": " ".join(WORDS[(i + j) % 6] for j in range(3 + i % 5)), "label": i % 2} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "computation": {"mode": "posttraining", "method": "fine_tuning"},
        "training": {"learning_rate": 1e-2, "batch_size": 4, "precision": "fp32", "device": "cpu", **training},
        "distributed": {"silence": 3},
        "data": {
            "pretrained_weights": str(pico_folder),
            "training_data": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "run"),
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "config.json"


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "loopos", "train", str(config), "--nproc", "2", *words]


def steps_of(run: Path) -> list[dict[str, Any]]:
    if not (run / "events.jsonl").exists():
        return []
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in events if event["event"] == "step"]


def process_of_rank(rank: int, launcher: int) -> int:
    """The process that the launcher gave this rank."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize("number", slow_but(1, [1, 2]))
def test_it_trains_in_processes(number: int, tmp_path: Path, pico_folder: Path) -> None:
    """The launcher is forked, what it starts are processes of their own, each of which imports torch."""
    config = config_of(tmp_path, pico_folder, num_epochs=1)
    with Child(lambda: app(["train", str(config), "--nproc", str(number), "--json"])) as launcher:
        assert launcher.wait(time.monotonic() + 240) == 0, launcher.errors
        answer = json.loads(launcher.output)
    # 58 of 64 rows train, four a step and process.
    assert answer["stopped_by"] == "epochs"
    assert answer["step"] == {1: 15, 2: 8}[number]
    assert (tmp_path / "run" / "model" / "loopos.json").is_file()


@pytest.mark.slow
def test_an_error_of_all_processes_is_reported_once(tmp_path: Path, pico_folder: Path) -> None:
    config = config_of(tmp_path, pico_folder, num_epochs=1)
    (tmp_path / "rows.jsonl").write_text('{"text": "lamp"}\n', encoding="utf-8")
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.count("no label column found") == 1, done.stderr
    assert "rank" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_is_lost_all_end_and_the_run_can_be_resumed(
    sent: signal.Signals, tmp_path: Path, pico_folder: Path
) -> None:
    config = config_of(tmp_path, pico_folder, num_epochs=4000, save_every=5)
    launcher = subprocess.Popen(command(config, "--quiet"), stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 240
    while len(steps_of(tmp_path / "run")) < 12 and launcher.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    first, second = (process_of_rank(rank, launcher.pid) for rank in (0, 1))
    os.kill(second, sent)
    limit = time.monotonic() + 30
    while Path(f"/proc/{first}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not Path(f"/proc/{first}").exists()
    if sent == signal.SIGSTOP:
        # The launcher would give it half a minute to answer to SIGTERM.
        os.kill(second, signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "rank 1" in errors
    assert "Traceback" not in errors
    done = subprocess.run(
        command(config, "--resume", "--quiet", "training.max_steps=20"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run")[-1]["step"] == 20
