"""A folder is whole or not there, whatever processes that died have left beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopos.storage.whole_folder import hidden, whole_folder


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_new_folder_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    out = folder_with(tmp_path / "out", "old")
    with whole_folder(out) as partial:
        (partial / "inside").mkdir()
        (partial / "file").write_text("new")
        assert (out / "file").read_text() == "old"
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = folder_with(tmp_path / "out", "old")
    with pytest.raises(FileExistsError), whole_folder(out) as partial:
        folder_with(partial, "half")
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_dead_processes_left_goes_and_what_others_hold_stays(tmp_path: Path, dead: int) -> None:
    left = (f".out.partial-{dead}", f".out.replaced-{dead}", f"..out.partial-{dead}.replaced-{dead}")
    # Of another folder, whose name begins alike; of a process that runs; of nobody.
    unrelated = (f".out.v2.partial-{dead}", f".out.partial-{os.getppid()}", ".out.notes-1")
    for name in (*left, *unrelated):
        folder_with(tmp_path / name, "half")
    folder_with(tmp_path / "out", "old")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == sorted((*unrelated, "out"))


def test_what_was_about_to_be_replaced_goes_back(tmp_path: Path, dead: int) -> None:
    """Killed between the two renames: the old content has only its hidden name."""
    folder_with(tmp_path / f".out.replaced-{dead}", "old")
    folder_with(tmp_path / f".out.partial-{dead}", "new")
    with pytest.raises(KeyError), whole_folder(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_may_be_written_whole_inside_one_that_is(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as partial, whole_folder(partial) as inner:
        assert inner == hidden(partial, "partial")
        (inner / "file").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_a_folder_that_must_not_replace_keeps_the_existing_one(tmp_path: Path) -> None:
    """Another process was first; it may have its folder open."""
    with whole_folder(tmp_path / "out", replaces=False) as partial:
        (partial / "file").write_text("ours")
        folder_with(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["out"]
    with whole_folder(tmp_path / "new", replaces=False) as partial:
        (partial / "file").write_text("ours")
    assert (tmp_path / "new" / "file").read_text() == "ours"


def test_another_process_may_clear_too(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = folder_with(tmp_path / f".out.partial-{dead}", "half")
    remove = shutil.rmtree

    def both(path: Path, **options: bool) -> None:
        if path == left:
            remove(path)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", both)
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["out"]
