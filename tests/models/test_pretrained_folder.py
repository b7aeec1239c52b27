"""Pretrained weights as a folder or a file: flushed before they get their names, without leftovers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from killed_runs import in_a_child

from loopos.models import folders
from loopos.models.folders import save_pretrained
from loopos.models.load import load_pretrained


@pytest.mark.parametrize("name", ["folder", "folder/weights.bin"])
def test_files_are_durable_before_they_have_their_names(
    name: str, pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load_pretrained(str(pico_folder), causal=True)
    path, folder = tmp_path / name, tmp_path / "folder"
    synced: list[int] = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def renamed(file: Path, target: Path) -> Path:
        assert file.stat().st_ino in synced
        if file.name == "model.safetensors":
            # The last: whoever finds weights finds config and tokenizer.
            assert synced[-1] == folder.stat().st_ino
            assert (folder / "config.json").is_file()
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    save_pretrained(path, opened.model, opened.tokenizer)
    assert synced[-1] == folder.stat().st_ino
    monkeypatch.undo()
    weights = "model.safetensors" if path == folder else path.name
    assert {weights, "config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_what_a_killed_writer_left_goes(pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_pretrained(str(pico_folder), causal=True)
    monkeypatch.setattr(folders, "fsync_path", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    assert in_a_child(lambda: save_pretrained(tmp_path, opened.model, opened.tokenizer), None) == -signal.SIGKILL
    assert not (tmp_path / "model.safetensors").exists()
    assert [path.name.startswith(".model.safetensors.partial-") for path in tmp_path.glob(".*")] == [True]
    monkeypatch.undo()
    save_pretrained(tmp_path, opened.model, opened.tokenizer)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "model.safetensors").is_file()
