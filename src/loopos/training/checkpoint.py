"""Checkpoints: tensors by group and JSON state enter, a verified folder leaves, and the newest whole one comes back.

    checkpoints/step-00000100/   weights.safetensors  optimizer.safetensors  state.json  manifest.json

A folder is written beside its place under a hidden name, every file fsynced, the manifest last with the size and
SHA-256 of each, then renamed: a crash at any instant leaves the old or the new state. Saving a step that is there
already replaces it; in the instant between the two renames the old one is still found under its hidden name.
One process writes a run; any number may read. Left out: what the state means, and tied tensors (each name is
written by itself, so the caller names a shared tensor once).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loopos.storage.durable import JSON, DiskFull, disk_full_said, fsync_place
from loopos.storage.tensor_format import num_bytes
from loopos.storage.whole_folder import hidden, is_another_process, put_in_place
from loopos.training.checkpoint_folder import (
    HIDDEN_NAME,
    STATE,
    STEP_NAME,
    TENSORS_SUFFIX,
    CheckpointError,
    check_hashes,
    check_sizes,
    encode_state,
    folder_name,
    looks_whole,
    read_manifest,
    write_folder,
)
from loopos.training.random_states import random_states, restore_random_states

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "DiskFull",
    "NonFiniteError",
    "best",
    "load",
    "newest_whole",
    "prune",
    "random_states",
    "restore_random_states",
    "save",
    "sweep",
]

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Weights hold nan or inf and were therefore not saved."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint. `tensors` is group → name → tensor on the CPU, mapped from the file until changed."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    metric: float | None
    is_best: bool


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, JSON],
    *,
    metric: float | None = None,
    is_best: bool = False,
) -> Path:
    """Write checkpoint `step` under `root` durably and return its folder; replaces one of the same step.

    Leftovers of saves that died are cleared first and logged as warnings. At no time is more than one tensor copied.

    Raises:
        NonFiniteError: the group "weights" holds nan or inf; nothing was written.
        DiskFull: no space or quota left; what was written of this checkpoint is removed, earlier ones are whole.
    """
    assert step >= 0, f"step {step} is negative"
    assert metric is None or math.isfinite(metric), f"a checkpoint's metric is finite or None, not {metric}"
    _refuse_nonfinite(tensors.get("weights", {}))
    content = encode_state(state)
    needed_bytes = len(content) + sum(num_bytes(group) for group in tensors.values())
    final = root / folder_name(step)
    partial = hidden(final, "partial")
    with disk_full_said(root, needed_bytes, f"the checkpoint of step {step}"):
        if not root.is_dir():
            root.mkdir(parents=True)
            fsync_place(root.parent)
        for line in sweep(root):
            logger.warning(line)
        try:
            partial.mkdir()
            write_folder(partial, tensors, content, {"step": step, "metric": metric, "is_best": is_best})
            put_in_place(partial, final)
        except BaseException:
            # What cannot be removed now is cleared, and said, by the next save.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder after checking every file's size and SHA-256 against the manifest.

    Raises `CheckpointError`, which names the first file that is missing, cut, changed or of another format.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_hashes(path, manifest)
    groups = [name for name in manifest["files"] if name.endswith(TENSORS_SUFFIX)]
    return Checkpoint(
        path=path,
        step=manifest["step"],
        tensors={name.removesuffix(TENSORS_SUFFIX): load_file(path / name) for name in groups},
        state=json.loads((path / STATE).read_bytes()),
        metric=manifest["metric"],
        is_best=manifest["is_best"],
    )


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one rejected and each save that never ended."""
    said = [
        f"{entry}: half-written, its save has not ended; not used"
        for entry in _entries(root)
        if (caught := HIDDEN_NAME.fullmatch(entry.name)) and caught[2] == "partial"
    ]
    for folder in _folders(root):
        try:
            checkpoint = load(folder)
        except CheckpointError as error:
            said.append(f"{error.problem}; not used")
        else:
            if said:
                said.append(f"{folder}: the newest whole checkpoint, used")
            return checkpoint, said
    return None, said


def best(root: Path) -> Path | None:
    """The newest checkpoint saved with `is_best` whose manifest and file sizes are right; None when there is none."""
    return next((folder for folder in _folders(root) if looks_whole(folder) and read_manifest(folder)["is_best"]), None)


def prune(root: Path, keep_last: int, keep_best: bool) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints and, with `keep_best`, the best one; returns what was removed.

    Only checkpoints whose manifest and file sizes are right count as kept. Newer damaged ones stay for the user to
    look at; damaged ones older than those kept are removed.
    """
    assert keep_last >= 1, "the newest checkpoint always stays"
    folders = _folders(root)
    whole = [folder for folder in folders if looks_whole(folder)]
    kept = whole[:keep_last]
    if not kept:
        return []
    best_folder = best(root) if keep_best else None
    oldest_kept = folders.index(kept[-1])
    removed = [folder for folder in folders[oldest_kept + 1 :] if folder != best_folder]
    for folder in removed:
        # Out of sight first: a removal that is cut short must not look like a damaged checkpoint.
        doomed = folder if folder.name.startswith(".") else hidden(folder, "removed")
        if doomed != folder:
            os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return removed


def sweep(root: Path) -> list[str]:
    """Clear what dead processes left half done under `root`; returns one line for each thing done.

    A checkpoint caught between the two renames of its replacement gets its name back.
    """
    said = []
    for entry in _entries(root):
        caught = HIDDEN_NAME.fullmatch(entry.name)
        if caught is None or is_another_process(int(caught[3])):
            continue
        if caught[2] == "replaced" and not (root / caught[1]).exists():
            os.rename(entry, root / caught[1])
            fsync_place(root)
            said.append(f"{root / caught[1]}: put back, its replacement was never finished")
        else:
            shutil.rmtree(entry)
            said.append(f"{entry}: removed, left by process {caught[3]} that ended before it was done")
    return said


def _refuse_nonfinite(weights: Mapping[str, torch.Tensor]) -> None:
    bad = []
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel() > 0:
            values = weight.detach()
            # Extremes carry nan and inf through without a mask as large as the weight; 8-bit floats have none.
            low, high = torch.aminmax(values.float() if values.element_size() == 1 else values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    if bad:
        listed = ", ".join(bad[:5]) + (" and others" if len(bad) > 5 else "")
        raise NonFiniteError(f"nan or inf in {len(bad)} of {len(weights)} weights, not saved: {listed}")


def _entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _folders(root: Path) -> list[Path]:
    """All checkpoint folders, newest first; one caught in the middle of its replacement under its hidden name."""
    found: dict[int, Path] = {}
    for entry in _entries(root):
        caught = HIDDEN_NAME.fullmatch(entry.name)
        if caught and caught[2] == "replaced":
            found[int(caught[1].removeprefix("step-"))] = entry
    for entry in _entries(root):
        if visible := STEP_NAME.fullmatch(entry.name):
            found[int(visible[1])] = entry
    return [found[step] for step in sorted(found, reverse=True)]
