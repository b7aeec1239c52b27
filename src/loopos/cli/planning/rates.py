"""How fast this machine multiplies and copies, measured in about a second.

Enters: a device and a number format. Leaves: operations and bytes a second. The figures are those of now: another
program on the same cores shows in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_MEASURE_SECONDS = 0.5


def measured_rates(device: torch.device, *, half: bool) -> tuple[float, float]:
    """Operations a second of a large matrix product in the run's format, and bytes a second of a copy, read and write
    counted.
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
    """How many times a second `work` can be done."""
    work()
    _wait(device)
    began, done = time.monotonic(), 0
    while time.monotonic() - began < _MEASURE_SECONDS:
        work()
        _wait(device)
        done += 1
    return done / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
