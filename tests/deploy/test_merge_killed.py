"""A merge that is killed leaves nothing under its name, and runs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from merge_models import run, variant

PROGRAM = """
import sys, time
from loopos.config.load import load_recipe
from loopos.config.merge import MergeConfig
from loopos.config.nodes import MappingNode, Mark
from loopos.config.source import COMMAND_LINE, Source
from loopos.deploy.merge import merge

root = Source(COMMAND_LINE, "", MappingNode({}, {}, Mark(COMMAND_LINE)))
recipe = load_recipe(root, sys.argv[1:], MergeConfig).config

def wait(done, total):
    if done == total // 2:
        print("half", flush=True)
        time.sleep(600)

merge(recipe, on_progress=wait)
"""


def test_killed_in_the_middle(pico_folder: Path, tmp_path: Path) -> None:
    one, two = (variant(pico_folder, tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2)))
    words = ["method=linear", f'models=["{one}", "{two}"]', f"output_dir={tmp_path / 'out'}"]
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    # Half a merge lies beside, under a name of its own; nothing under the one that was asked for.
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
