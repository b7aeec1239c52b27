"""Checkpoints: tensors by group and JSON state, stored as verified folders.

    checkpoints/step-00000100/   weights.safetensors  optimizer.safetensors  state.json  manifest.json

With a model that is sharded over N processes, weights and optimizer are N files each (`slices.py`) and read as one. A
folder is written under a hidden name, each file with fsync, the manifest last with size and SHA-256 of each file, then
renamed: a crash at any instant leaves the old or the new state. Saving an existing step replaces it; between the two
renames the old one is found under its hidden name. One run writes; any number of processes may read. Tied tensors must
be passed under one name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopos.storage.durable import JSON, DiskFull
from loopos.storage.whole_folder import hidden, remove
from loopos.training.checkpoint_files import (
    HIDDEN_NAME,
    STATE,
    STEP_NAME,
    TENSORS_SUFFIX,
    CheckpointError,
    NonFiniteError,
    Save,
    check_hashes,
    check_sizes,
    looks_whole,
    read_group,
    read_manifest,
    save,
    sweep,
)
from loopos.training.random_states import random_states, restore_random_states
from loopos.training.slices import group_of

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "DiskFull",
    "NonFiniteError",
    "Save",
    "best",
    "load",
    "newest_whole",
    "prune",
    "random_states",
    "restore_random_states",
    "save",
    "sweep",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint. `tensors`: group → name → tensor on the CPU, memory-mapped until changed."""

    path: Path
    step: int
    tensors: dict[str, Mapping[str, torch.Tensor]]
    state: dict[str, Any]
    metric: float | None
    is_best: bool


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint folder after checking every file's size and SHA-256 against the manifest.

    Raises `CheckpointError`, which names the first file that is missing, truncated, changed or of another format.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_hashes(path, manifest)
    files: dict[str, list[Path]] = {}
    for name in sorted(name for name in manifest["files"] if name.endswith(TENSORS_SUFFIX)):
        stem = name.removesuffix(TENSORS_SUFFIX)
        files.setdefault(group_of(stem) or stem, []).append(path / name)
    return Checkpoint(
        path=path,
        step=manifest["step"],
        tensors={group: read_group(parts) for group, parts in files.items()},
        state=json.loads((path / STATE).read_bytes()),
        metric=manifest["metric"],
        is_best=manifest["is_best"],
    )


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and one line for each newer one that was rejected and each save that never
    finished.
    """
    summary = [
        f"{entry}: half-written, its save has not ended; not used"
        for entry in _entries(root)
        if (caught := HIDDEN_NAME.fullmatch(entry.name)) and caught[2] == "partial"
    ]
    for folder in _folders(root):
        try:
            checkpoint = load(folder)
        except CheckpointError as error:
            summary.append(f"{error.problem}; not used")
        else:
            if summary:
                summary.append(f"{folder}: the newest whole checkpoint, used")
            return checkpoint, summary
    return None, summary


def best(root: Path) -> Path | None:
    """The newest checkpoint saved with `is_best` whose manifest and file sizes are right; None without one."""
    return next((folder for folder in _folders(root) if looks_whole(folder) and read_manifest(folder)["is_best"]), None)


def prune(root: Path, keep_last: int, keep_best: bool, *, newest: int | None = None) -> list[Path]:
    """Removes all but the newest `keep_last` checkpoints and, with `keep_best`, the best one; returns what was removed.
    newest: the step of the newest reliable checkpoint, if known; those of later steps stay.

    Only checkpoints whose manifest and file sizes are right count towards `keep_last`. Newer damaged ones stay for the
    user to inspect; older damaged ones are removed.
    """
    assert keep_last >= 1, "the newest checkpoint always stays"
    folders = [folder for step, folder in _by_step(root) if newest is None or step <= newest]
    whole = [folder for folder in folders if looks_whole(folder)]
    retained = whole[:keep_last]
    if not retained:
        return []
    best_folder = best(root) if keep_best else None
    oldest_to_keep = folders.index(retained[-1])
    removed = [folder for folder in folders[oldest_to_keep + 1 :] if folder != best_folder]
    for folder in removed:
        # Rename first: an interrupted removal must not look like a damaged checkpoint.
        doomed = folder if folder.name.startswith(".") else hidden(folder, "removed")
        if doomed != folder:
            os.rename(folder, doomed)
        remove(doomed)
    return removed


def _entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _folders(root: Path) -> list[Path]:
    """All checkpoint folders, newest first."""
    return [folder for _, folder in _by_step(root)]


def _by_step(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints, newest first; an interrupted replacement under its hidden name."""
    found: dict[int, Path] = {}
    for entry in _entries(root):
        caught = HIDDEN_NAME.fullmatch(entry.name)
        if caught and caught[2] == "replaced":
            found[int(caught[1].removeprefix("step-"))] = entry
    for entry in _entries(root):
        if visible := STEP_NAME.fullmatch(entry.name):
            found[int(visible[1])] = entry
    return [(step, found[step]) for step in sorted(found, reverse=True)]
