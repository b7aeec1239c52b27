"""A run's folder, claimed: what is refused, what is cleared, and what every process of a run learns of it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loopos.config.diagnostics import UserError
from loopos.evaluation.run_claim import claim
from loopos.storage.durable import DiskFull
from loopos.storage.folder_lock import LOCK


@dataclass
class Processes:
    """One process of a run, and what it receives from the first one."""

    is_first: bool = True
    told: object = None
    actual: list[object] = field(default_factory=list)

    def gather(self, value: object) -> list[object]:
        self.actual.append(value)
        return [value if self.is_first else self.told, value]


def claimed(folder: Path, *, resume: bool = False, world: Processes | None = None) -> list[str]:
    notes: list[str] = []
    with claim(folder, world or Processes(), resume=resume, note=notes.append):
        assert (folder / LOCK).is_file() == (world is None or world.is_first)
    return notes


@pytest.mark.parametrize("name", ["events.jsonl", "config.json", "samples.jsonl", LOCK])
@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_something_else_instead_of_a_file_is_named(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if kind == "folder" else os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: expected a (regular )?file"):
        claimed(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["checkpoints", "model", "adapter", "curves"])
def test_a_file_instead_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: expected a folder of the run, got a file"):
        claimed(tmp_path)
    assert (tmp_path / name).is_file()


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    for name in (".model.partial-4000000", ".adapter.replaced-4000000", ".checkpoints.removed-4000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".config.json.partial-4000000").touch()
    notes = claimed(tmp_path, resume=True)
    assert len(notes) == 4
    # The folder that was about to be replaced is put back: nothing has taken its place.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]


def test_every_process_of_a_run_learns_why_the_first_one_refuses(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    first = Processes()
    with pytest.raises(UserError, match="already contains a run") as refused:
        claimed(tmp_path, world=first)
    with pytest.raises(UserError, match="already contains a run") as elsewhere:
        claimed(tmp_path, world=Processes(is_first=False, told=first.actual[0]))
    assert str(elsewhere.value) == str(refused.value)
    claimed(tmp_path, resume=True, world=Processes(is_first=False))


def test_a_full_disk_and_an_unwritable_path_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> None:
        def mkdir(self: Path, *arguments: object, **named: object) -> None:
            raise OSError(code, os.strerror(code), str(self))

        monkeypatch.setattr(Path, "mkdir", mkdir)

    fail(errno.ENOSPC)
    with pytest.raises(DiskFull, match="the run's folder needs"):
        claimed(tmp_path / "run")
    fail(errno.EROFS)
    with pytest.raises(UserError, match=r"run: not writable: Read-only file system; choose another folder"):
        claimed(tmp_path / "run")
