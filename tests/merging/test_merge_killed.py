"""A merge that is killed leaves nothing under its name, and runs again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from killed_runs import in_a_child
from merge_models import recipe_of, run, variant

from loopos.merging.merge import merge


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_on_the_way(share: float, pico_folder: Path, tmp_path: Path) -> None:
    one, two = (variant(pico_folder, tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2)))
    recipe = recipe_of("linear", [one, two], tmp_path / "out")

    def kill(done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lambda: merge(recipe, on_progress=kill), None) == -signal.SIGKILL
    # What was written lies beside, under a name of its own; nothing under the one that was asked for.
    assert [each.name.startswith(".out.partial-") for each in tmp_path.glob(".out*")] == [True]
    assert not (tmp_path / "out").exists()
    run("linear", [one, two], tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "out", "two"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_result_is_on_the_disk_before_it_has_its_name(
    pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        # The last is the folder that holds the new name.
        assert (tmp_path / "out").exists() == (synced[-1] == tmp_path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run("linear", [pico_folder, pico_folder], tmp_path / "out")
    monkeypatch.undo()
    assert {each.name for each in (tmp_path / "out").iterdir()} <= set(synced)
    assert synced[-1] == tmp_path.name
