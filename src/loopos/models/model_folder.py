"""The folder of a trained model: how it is written whole or not at all, where it is, and what it says of itself.

Enters: a folder and what to write. Leaves: the folder, or its description (`loopos.json`). Left out: the models
(`task_folder.py`, `language_folder.py`), checkpoints of a run in progress (`training.checkpoint`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loopos.config.durable import fsync_place
from loopos.config.faults import UserError
from loopos.config.paths import MODEL_DESCRIPTION

FORMAT = 1


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at once when the block ends, and vanishes when it fails.

    Raises `OSError` when the disk is full.
    """
    # One process writes a run: what lies beside is left by one that was killed.
    # One of two dots was to become the content of one that was being written itself.
    for left in (*folder.parent.glob(f".{folder.name}.*-*"), *folder.parent.glob(f"..{folder.name}.*-*")):
        shutil.rmtree(left)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    except SafetensorError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors hides the system's error number; a caller that handles a full disk needs it.
        if f"os error {errno.ENOSPC}" in str(problem):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from problem
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _make_durable(partial)
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    fsync_place(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    """What lies in a folder survives a power cut from now on; a rename alone may come before what it names."""
    for place in (*folder.rglob("*"), folder):
        fsync_place(place)


def model_folder(place: str | Path) -> Path:
    """The folder of a trained model: `place` itself, or `model/` in a run's output folder. Raises `UserError` when
    there is none.
    """
    for folder in (Path(place), Path(place) / "model"):
        if (folder / MODEL_DESCRIPTION).is_file():
            return folder
    if (Path(place) / "events.jsonl").is_file():
        raise UserError(f"{place}: this run has no finished model yet; go on with loopos train CONFIG --resume")
    raise UserError(f"{place}: no trained model here; wanted the output_dir of a finished run, or its folder model/")


def read_description(folder: Path) -> dict[str, Any]:
    """What a trained model's folder says of itself. Raises `UserError` where it is broken or of another version."""
    file = folder / MODEL_DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder}: broken: {problem}; make it again: loopos train CONFIG --resume") from problem
    if not isinstance(description, dict):
        raise UserError(f"{file}: broken: no JSON object; make it again: loopos train CONFIG --resume")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {description.get('format')}, wanted {FORMAT}: written by another version of LoopOS"
        )
    return description
