"""Stops the process of a run, and starts one that resumes it.

A run stops as by `kill PID`: after its current step, with a checkpoint. It resumes as `loopos train CONFIG --resume` in
a process of its own, which outlives the app; what it prints goes to `NAME.resume.log` beside the run's folder.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from loopos.config.diagnostics import UserError
from loopos.evaluation.run_folder import CONFIG, RunFolder
from loopos.storage.folder_lock import lock_state
from loopos.web.security import inside

_TAIL_BYTES = 2000
# The app's token is none of a run's business.
_PRIVATE = ("LOOPOS_UI_TOKEN",)


def stop(folder: Path) -> int:
    """Sends SIGTERM to the process that writes the run; its number. Raises `UserError` if there is none here."""
    lock = lock_state(folder)
    if lock is None or not lock.is_active:
        raise UserError("the run is not running")
    if lock.holder.host != socket.gethostname():
        raise UserError(f"the run is on {lock.holder.host}; stop it there: kill {lock.holder.pid}")
    if lock.holder.pid <= 1:
        raise UserError("the run's process is unknown: its run.lock cannot be read; try again")
    try:
        os.kill(lock.holder.pid, signal.SIGTERM)
    except ProcessLookupError as error:
        raise UserError("the run is not running") from error
    except PermissionError as error:
        raise UserError(f"process {lock.holder.pid} belongs to another user; stop it as that user") from error
    return lock.holder.pid


def resume_command(run: RunFolder, root: Path) -> tuple[list[str], Path]:
    """The command that resumes a run, and the folder that it starts in: the one from which the config's relative
    `data.output_dir` leads to the run. Raises `UserError` where the files do not determine it.
    """
    config = run.folder / CONFIG
    arguments = ["train", str(config), "--resume"]
    by_hand = f"run it where it was started: loopos {shlex.join(arguments)}"
    processes = _processes(run)
    if processes > 1:
        raise UserError(f"the run had {processes} processes; start it as before, with --resume")
    output = Path(str(run.config.get("data", {}).get("output_dir", "")))
    if output.is_absolute():
        if output.resolve() != run.folder.resolve():
            raise UserError(f"the run was started for {output}, and was moved; {by_hand}")
        return [sys.executable, "-m", "loopos", *arguments], root
    parts = [part for part in output.parts if part != "."]
    if not parts or ".." in parts or run.folder.parts[-len(parts) :] != tuple(parts):
        raise UserError(f"the folder in which the run was started is unknown (output_dir {output}); {by_hand}")
    return [sys.executable, "-m", "loopos", *arguments], Path(*run.folder.parts[: -len(parts)])


def _processes(run: RunFolder) -> int:
    sessions = [event["metrics"] for event in run.events if event["event"] == "session"]
    machine = sessions[-1].get("machine") if sessions else None
    return int(machine.get("processes", 1)) if isinstance(machine, dict) else 1


@dataclass
class Started:
    """The processes that this app has started, by the id of their run."""

    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def resume(self, key: str, run: RunFolder, root: Path) -> int:
        """Starts the process that resumes a run; its number. Raises `UserError` if it runs already or cannot start."""
        lock = lock_state(run.folder)
        if (lock is not None and lock.is_active) or self._is_active(key):
            raise UserError("the run is running")
        command, where = resume_command(run, root)
        environment = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
        with _log(run.folder, root) as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=where,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{shlex.join(command)}: {error.strerror}") from error
        self._processes[key] = process
        return process.pid

    def _is_active(self, key: str) -> bool:
        process = self._processes.get(key)
        return process is not None and process.poll() is None

    def state(self, key: str, folder: Path, root: Path) -> dict[str, Any] | None:
        """Of the last process that was started for a run: `is_active`, its exit `status`, and the end of what it
        printed. None if none was.
        """
        process = self._processes.get(key)
        if process is None:
            return None
        file = log_file(folder)
        text = ""
        if inside(root, file):
            with file.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        return {"is_active": process.poll() is None, "status": process.returncode, "printed": text}


def log_file(folder: Path) -> Path:
    """Where a resumed run prints."""
    return folder.with_name(f"{folder.name}.resume.log")


def _log(folder: Path, root: Path) -> IO[bytes]:
    if folder == root:
        raise UserError(
            f"what the run prints is stored beside its folder; open the folder above: loopos ui {root.parent}"
        )
    try:
        descriptor = os.open(
            log_file(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
    except OSError as error:
        raise UserError(f"{log_file(folder)}: {error.strerror}") from error
    return os.fdopen(descriptor, "wb")
