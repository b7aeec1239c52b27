"""Claims a run folder: only one run at a time writes there, and none overwrites another. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from loopos.config.diagnostics import UserError
from loopos.evaluation.run_folder import CONFIG, EVENTS, holds_run
from loopos.storage.durable import DiskFull, explain_disk_full
from loopos.storage.folder_lock import only_writer
from loopos.storage.whole_folder import clear_leftovers

_FILES = (CONFIG, EVENTS, "samples.jsonl", "rollouts.jsonl", "report.md")
_FOLDERS = ("checkpoints", "model", "adapter", "curves", "rounds")
# Bytes that a folder needs on the disk: an entry and a block.
_NEEDED_BYTES = 4096


class Processes(Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def is_first(self) -> bool: ...

    def gather(self, value: object) -> list[object]: ...


def refuse_started(folder: Path) -> None:
    """Raises `UserError` if `folder` contains a run: nothing is overwritten."""
    if holds_run(folder):
        raise UserError(
            f"data.output_dir: {folder} already contains a run; continue it with --resume (in Python: resume=True), or "
            "choose another output_dir"
        )


@contextmanager
def claim(folder: Path, world: Processes, *, resume: bool, note: Callable[[str], None]) -> Iterator[None]:
    """Locks a run folder for this process, or for all processes of a run by the first one, and removes incomplete files
    of killed processes. note: receives messages for the user.

    Raises, on every process, `UserError` if another process holds the lock, if the folder contains a run or checkpoints
    that are not resumed, or a file of an unexpected kind; `DiskFull`.
    """
    with ExitStack() as lock:
        problem: UserError | None = None
        if world.is_first:
            try:
                with explain_disk_full(folder, _NEEDED_BYTES, "the run's folder"):
                    lock.enter_context(only_writer(folder, note=note))
                    _check(folder, resume=resume)
                    for line in clear_leftovers(folder):
                        note(line)
            except UserError as found:
                problem = found
        problems = world.gather(None if problem is None else (str(problem), isinstance(problem, DiskFull)))
        first = problems[0]
        if problem is not None:
            raise problem
        if isinstance(first, tuple):
            raise DiskFull(first[0]) if first[1] else UserError(first[0])
        yield


def _check(folder: Path, *, resume: bool) -> None:
    if not resume:
        refuse_started(folder)
        if any((folder / "checkpoints").glob("step-*")):
            raise UserError(
                f"data.output_dir: {folder} contains checkpoints of another run; choose an empty or new folder"
            )
    for name in _FILES:
        path = folder / name
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a file of the run, got {_kind(path)}; move it away")
    for name in _FOLDERS:
        path = folder / name
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: expected a folder of the run, got a file; move it away")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "something that is neither a file nor a folder"
