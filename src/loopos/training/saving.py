"""One checkpoint on its way to the disk, by one process or by all of a run, perhaps while training goes on.

    begin    the first process makes the hidden folder; weights that are not finite numbers are refused
    write    every process writes its files into it, in a thread of its own where it is asked for
    finish   the first process adds state and manifest, and gives the folder its name

Enters: the tensors that each process is to write, and JSON state. Leaves: a checkpoint folder, whole or not there. Left
out: what is in a folder (`checkpoint_folder.py`), reading (`checkpoint.py`). No tensor is copied: between `begin` and
`finish` they must not change. More than one host needs a file system that all share.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from loopos.config.faults import UserError
from loopos.storage.durable import JSON, StorageFault, disk_full_said, fsync_place
from loopos.storage.tensor_format import num_bytes
from loopos.storage.whole_folder import hidden, is_another_process, put_in_place, remove
from loopos.training.checkpoint_folder import (
    HIDDEN_NAME,
    Records,
    encode_state,
    folder_name,
    seal_folder,
    write_group,
)
from loopos.training.distributed import World
from loopos.training.slices import RowSpan

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Weights hold nan or inf and were therefore not saved."""


@dataclass
class Save:
    """The checkpoint of `step` under `root`. `tensors`: group → name → tensor, the files that this process writes.
    `rows`: of the members that are rows of larger tensors, which. `weights`: those that must be finite. `state`,
    `metric`, `is_best`: the first process's count.
    """

    root: Path
    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: Mapping[str, JSON]
    weights: Mapping[str, torch.Tensor]
    rows: Mapping[str, RowSpan] = field(default_factory=dict)
    metric: float | None = None
    is_best: bool = False
    world: World = World()

    def __post_init__(self) -> None:
        assert self.step >= 0, f"step {self.step} is negative"
        assert self.metric is None or math.isfinite(self.metric), f"{self.metric} is no metric of a checkpoint"
        self._content = encode_state(self.state)
        self._needed = len(self._content) + sum(num_bytes(group) for group in self.tensors.values())
        self._final = self.root / folder_name(self.step)
        self._partial = hidden(self._final, "partial")
        self._records: Records = {}
        self._problem: OSError | UserError | None = None
        self._thread: Thread | None = None

    def begin(self, *, in_background: bool = False) -> None:
        """Makes the folder and writes this process's files, or begins to. Leftovers of saves that died are cleared
        first and logged as warnings.

        Raises `NonFiniteError` on every process (nothing was written), `DiskFull`.
        """
        told = self.world.gather(_nonfinite(self.weights))
        _refuse_nonfinite([name for names in told for name in _names(names)], of=len(self.weights))
        if self.world.is_first:
            with self._disk_full_said():
                self._make_folder()
        self._partial = Path(str(self.world.gather(str(self._partial))[0]))
        if in_background:
            self._thread = Thread(target=self._write, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    def finish(self) -> Path:
        """Returns the folder, once it is whole. Raises `DiskFull`, on every process: what was written of this
        checkpoint is removed, earlier ones are whole.
        """
        if self._thread is not None:
            self._thread.join()
        problem = None if self._problem is None else (str(self._problem), isinstance(self._problem, StorageFault))
        gathered = self.world.gather((self._records, problem))
        told = [each for each in gathered if isinstance(each, tuple)]
        failed = [theirs for _, theirs in told if theirs is not None]
        if failed:
            self.give_up()
            said, is_of_storage = failed[0]
            raise self._problem or (StorageFault(said) if is_of_storage else UserError(said))
        if self.world.is_first:
            try:
                self._seal({name: record for written, _ in told for name, record in written.items()})
            # Ctrl-C too must leave no half of a checkpoint.
            except BaseException:
                self.give_up()
                raise
        self.world.wait()
        return self._final

    def _seal(self, records: Records) -> None:
        facts = {"step": self.step, "metric": self.metric, "is_best": self.is_best}
        with self._disk_full_said():
            seal_folder(self._partial, records, self._content, facts)
            put_in_place(self._partial, self._final)

    def give_up(self) -> None:
        """Removes what is there of it."""
        if self.world.is_first:
            # What cannot be removed now is cleared, and said, by the next save.
            shutil.rmtree(self._partial, ignore_errors=True)

    def _make_folder(self) -> None:
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            fsync_place(self.root.parent)
        for line in sweep(self.root):
            logger.warning(line)
        self._partial.mkdir()

    def _write(self) -> None:
        try:
            if not self._partial.is_dir():
                raise UserError(
                    f"{self._partial}: not seen by process {self.world.rank}; wanted an output_dir on a file system "
                    "that all hosts of the run share"
                )
            with self._disk_full_said():
                for group, members in self.tensors.items():
                    self._records |= write_group(self._partial, group, members, self.rows)
        except (OSError, UserError) as problem:
            # Told by `finish`, where all processes learn of it.
            self._problem = problem

    def _disk_full_said(self) -> Any:
        return disk_full_said(self.root, self._needed, f"the checkpoint of step {self.step}")


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
    saving = Save(root, step, tensors, state, tensors.get("weights", {}), metric=metric, is_best=is_best)
    try:
        saving.begin()
        return saving.finish()
    # Ctrl-C too must leave no half of a checkpoint.
    except BaseException:
        saving.give_up()
        raise


def sweep(root: Path, *, is_only_writer: bool = False) -> list[str]:
    """Clear what dead processes left half done under `root`; returns one line for each thing done. is_only_writer: this
    process holds the run's folder, so that what it finds is nobody's, whatever process has its number by now.

    A checkpoint caught between the two renames of its replacement gets its name back.
    """
    said = []
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        caught = HIDDEN_NAME.fullmatch(entry.name)
        if caught is None or (not is_only_writer and is_another_process(int(caught[3]))):
            continue
        if caught[2] == "replaced" and not (root / caught[1]).exists():
            os.rename(entry, root / caught[1])
            fsync_place(root)
            said.append(f"{root / caught[1]}: put back, its replacement was never finished")
        else:
            remove(entry)
            said.append(f"{entry}: removed, left by process {caught[3]} that ended before it was done")
    return said


def _nonfinite(weights: Mapping[str, torch.Tensor]) -> list[str]:
    bad = []
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel() > 0:
            values = weight.detach()
            # Extremes carry nan and inf through without a mask as large as the weight; 8-bit floats have none.
            low, high = torch.aminmax(values.float() if values.element_size() == 1 else values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    return bad


def _names(told: object) -> list[str]:
    assert isinstance(told, list), told
    return told


def _refuse_nonfinite(bad: Iterable[str], *, of: int) -> None:
    names = list(dict.fromkeys(bad))
    if names:
        listed = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
        raise NonFiniteError(f"nan or inf in {len(names)} of {of} weights, not saved: {listed}")
