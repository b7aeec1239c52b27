"""The machine for a dry run: device, memory, free disk, and the speed of products and copies, measured in about a
second.

Other programs on the same cores lower the measured rates.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """`process`: bytes that this process uses, which training would use too. `memory`: bytes of the training device.
    `operations_a_second`: of a large matrix product; `bytes_a_second`: of a copy, reads and writes counted.
    """

    device: torch.device
    precision: str
    process: int
    memory: int
    operations_a_second: float
    bytes_a_second: float

    @classmethod
    def now(cls, device: torch.device, precision: str, rates: tuple[float, float]) -> Machine:
        """This machine now, with what this process has imported and read; a CUDA device has its own memory."""
        process = psutil.Process().memory_info().rss if device.type != "cuda" else 0
        return cls(device, precision, process, _memory_of(device), *rates)

    @property
    def half_weights(self) -> bool:
        """Whether weights are numbers of 2 bytes; with fp16 they stay in fp32."""
        return self.precision == "bf16"

    @property
    def activation_number_bytes(self) -> int:
        """Bytes of a number that a forward pass keeps."""
        return 4 if self.precision == "fp32" else 2


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def free_bytes(folder: str) -> int:
    """Free bytes on the disk of `folder`, which need not exist."""
    location = Path(folder).absolute()
    existing = next(each for each in (location, *location.parents) if os.path.exists(each))
    return shutil.disk_usage(existing).free


_MEASURE_SECONDS = 0.5


def measured_rates(device: torch.device, *, half: bool) -> tuple[float, float]:
    """Operations per second of a large matrix product in the run's format, and bytes per second of a copy, reads and
    writes counted.
    """
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.ones(1024, 1024, dtype=dtype, device=device)
    right = torch.ones(1024, 4096, dtype=dtype, device=device)
    source = torch.ones(1 << 25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    products = _repeats(lambda: torch.mm(left, right), device)
    copies = _repeats(lambda: target.copy_(source), device)
    return products * 2.0 * 1024 * 1024 * 4096, copies * 2.0 * source.numel() * source.element_size()


def _repeats(work: Callable[[], object], device: torch.device) -> float:
    """How many times per second `work` can run."""
    work()
    _wait(device)
    began, completed = time.monotonic(), 0
    while time.monotonic() - began < _MEASURE_SECONDS:
        work()
        _wait(device)
        completed += 1
    return completed / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
