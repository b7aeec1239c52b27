"""The starting point of a session: what a run resumes from, and the facts that the log records about the session.

`starting_point` compares the newest complete checkpoint and its log with the config before anything is changed.
`run_state.py` restores the checkpoint; `identity.py` defines what must be equal.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopos.config.aliases import current_key
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
    """`num_rows` (training and validation), `judged_by` (the deciding metric and its direction), `own_metrics`
    (directions of the user's metrics, if any), `versions`, `machine`.
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
    """`versions` by package, and `machine`: processor, cores of this process, torch threads, `amx` (None if unknown),
    device, number of processes.
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
class StartingPoint:
    """Where a session starts: at a checkpoint, or at step 0. `changed`: settings that differ from those of the
    checkpoint's session, as (before, now). `lines`: messages for the user.
    """

    found: checkpoint.Checkpoint | None
    written: WrittenLog
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        return None if self.found is None else self.found.step

    def sentence(self) -> str:
        """Where a resumed run starts."""
        if self.found is None:
            return "no checkpoint to resume from: starting at step 0"
        return f"resumed from the checkpoint of step {self.found.step}"

    def facts(self) -> dict[str, JSON]:
        """Fields of the "session" event."""
        return {
            "resumed": self.found is not None,
            "changed": {key: list(values) for key, values in self.changed.items()},
        }


def starting_point(run_dir: Path, config: Mapping[str, Any], identity: Identity, *, resume: bool) -> StartingPoint:
    """Where a run starts in its folder. config: the resolved config.

    Raises `UserError`, with one line per key, for a checkpoint of a run with other data or outputs of another meaning,
    and for a log that is broken or does not belong to the checkpoint.
    """
    if not resume:
        return StartingPoint(None, WrittenLog.none(run_dir))
    found, lines = checkpoint.newest_whole(run_dir / "checkpoints")
    if found is None:
        return StartingPoint(None, WrittenLog.none(run_dir), lines=tuple(lines))
    written = WrittenLog.read(run_dir, found.state["events_offset"], found.state.get("events_sha256"))
    changed = changes(written.settings or config, config)
    # The folder may have moved; its path is not a training setting.
    changed.pop("data.output_dir", None)
    recorded = {current_key(name): value for name, value in found.state.get("identity", {}).items()}
    compared = compare(recorded, identity, changed)
    if compared.refused:
        raise UserError(
            f"{run_dir}: --resume: this config does not belong to the run in this folder:{as_lines(compared.refused)}\n"
            "resume with the original settings and data, or choose another output_dir"
        )
    return StartingPoint(found, written, compared.changed, (*lines, *written.warnings, *compared.sentences()))
