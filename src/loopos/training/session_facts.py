"""What the log records of every session, whatever the method: rows, what is judged by, versions, machine.

Enters: the parts of a run. Leaves: JSON. Left out: what a method adds. It stands apart from the loop because it reads
the system, which nothing else in this room does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from loopos.storage.durable import JSON
from loopos.training.distributed import World
from loopos.training.run_identity import RowCounts
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
    device = next(iter(update.masters.parameters.values())).device
    return {"num_rows": rows, **judged, **about_machine(device, world.size)}


def about_machine(device: torch.device, num_processes: int) -> dict[str, JSON]:
    """`versions` by package, and `machine`: processor, cores of this process, threads of torch, `amx` (None where the
    system does not tell), the device, the number of processes.
    """
    processor, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
