"""What the log records of every session, whatever the method: rows, what is judged by, versions, machine.

Enters: the parts of a run. Leaves: JSON. Left out: what a method adds. It stands apart from the loop because it reads
the system, which nothing else in this room does.

What a run resumes from, found and held against the run, before anything is changed.

Enters: a run's folder, its config, its identity. Leaves: the newest whole checkpoint with its log, the settings that
have changed since and what the user is to know; or a refusal. Left out: the restoring itself (`run_state.py`), what
makes a run this run (`run_identity.py`).
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopos.config.diagnostics import UserError
from loopos.config.differences import changes
from loopos.config.machine import usable_cores
from loopos.storage.durable import JSON
from loopos.training import checkpoint
from loopos.training.distributed import World
from loopos.training.identity import Identity, RowCounts, as_lines, compare
from loopos.training.run_log import WrittenLog
from loopos.training.update import Update
from loopos.training.validation import Validation

_PACKAGES = ("loopos", "torch", "transformers", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")


def session_facts(batches: RowCounts, validation: Validation | None, update: Update, world: World) -> dict[str, JSON]:
    """`num_rows` (trained on and validated on), `judged_by` (the metric that decides, and its direction),
    `own_metrics` (their directions, where there are any), `versions`, `machine`.
    """
    rows = {"training": batches.num_rows, "validation": validation.num_rows if validation is not None else None}
    judged: dict[str, JSON] = {}
    if validation is not None:
        judged = {"judged_by": {"metric": validation.metric, "mode": validation.mode}}
        if validation.own_metrics:
            judged["own_metrics"] = dict(validation.own_metrics)
    device = next(iter(update.master_weights.parameters.values())).device
    return {"num_rows": rows, **judged, **about_machine(device, world.size)}


def about_machine(device: torch.device, num_processes: int) -> dict[str, JSON]:
    """`versions` by package, and `machine`: processor, cores of this process, threads of torch, `amx` (None where the
    system does not tell), the device, the number of processes.
    """
    processor, flags = _processor()
    cores = usable_cores()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": processor,
            "cores": cores,
            "threads": torch.get_num_threads(),
            "amx": None if flags is None else "amx_tile" in flags,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": num_processes,
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> tuple[str, set[str] | None]:
    """The processor's name and, on Linux, its flags."""
    if not _CPU_INFO.is_file():
        return platform.processor() or platform.machine(), None
    found: dict[str, str] = {}
    for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = found.get("flags") or found.get("Features")
    return found.get("model name") or platform.machine(), None if flags is None else set(flags.split())


@dataclass(frozen=True)
class Beginning:
    """Where a session begins: at a checkpoint, or at step 0 without one. `changed`: settings that differ from those of
    the checkpoint's session, before and now. `lines`: for the user.
    """

    found: checkpoint.Checkpoint | None
    written: WrittenLog
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        return None if self.found is None else self.found.step

    def sentence(self) -> str:
        """Where a resumed run begins."""
        if self.found is None:
            return "no checkpoint to resume from: starting at step 0"
        return f"resumed from the checkpoint of step {self.found.step}"

    def facts(self) -> dict[str, JSON]:
        """What the log says of it."""
        return {
            "resumed": self.found is not None,
            "changed": {key: list(values) for key, values in self.changed.items()},
        }


def beginning(run_dir: Path, config: Mapping[str, Any], identity: Identity, *, resume: bool) -> Beginning:
    """Where a run begins in its folder. config: the resolved one.

    Raises `UserError` for a checkpoint of a run that learns from other rows or means something else, key by key, and
    for a log that is broken or is not the checkpoint's.
    """
    if not resume:
        return Beginning(None, WrittenLog.none(run_dir))
    found, lines = checkpoint.newest_whole(run_dir / "checkpoints")
    if found is None:
        return Beginning(None, WrittenLog.none(run_dir), lines=tuple(lines))
    written = WrittenLog.read(run_dir, found.state["events_offset"], found.state.get("events_sha256"))
    changed = changes(written.settings or config, config)
    # Where the folder lies by now is no setting of the training.
    changed.pop("data.output_dir", None)
    compared = compare(found.state.get("identity", {}), identity, changed)
    if compared.refused:
        raise UserError(
            f"{run_dir}: --resume: this is another run than the one that was begun there:{as_lines(compared.refused)}\n"
            "resume it with what it began with, or choose another output_dir"
        )
    return Beginning(found, written, compared.changed, (*lines, *written.warnings, *compared.sentences()))
