"""Learning-rate schedules: pure functions from a step to a factor in [0, 1] on the peak learning rate, and one stateful
schedule, `Plateau`.

Steps count optimizer steps from 0. With w warm-up steps, step s gets the factor (s + 1) / w, so that no step has a rate
of zero and step w - 1 is the first at the peak. The `LambdaLR` schedules of transformers use s / w, one step later.
After the warm-up both agree: the peak at step w, the floor after the last step (s = total_steps).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

Schedule: TypeAlias = Literal[
    "constant", "linear", "cosine", "cosine_restarts", "warmup_stable_decay", "plateau", "inverse_sqrt"
]


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """Warm-up steps from a count (an int >= 0) or a fraction of all steps (a float in (0, 1), rounded, at least 1)."""
    if isinstance(warmup, int) or warmup == 0:
        assert warmup >= 0, f"{warmup} steps of warm-up"
        return int(warmup)
    assert 0 < warmup < 1, f"warmup fraction: got {warmup}; expected between 0 and 1"
    return max(1, round(warmup * total_steps))


def factor(
    schedule: Schedule,
    step: int,
    total_steps: int,
    warmup_steps: int = 0,
    minimum_ratio: float = 0.0,
    num_cycles: int = 1,
    decay_share: float = 0.1,
) -> float:
    """Factor on the peak learning rate at `step`: minimum_ratio + (1 - minimum_ratio) * shape after the warm-up.

    With p = (step - w) / (total_steps - w) the shapes are: constant 1 · linear 1 - p · cosine (1 + cos πp) / 2 ·
    cosine_restarts the cosine of the fractional part of num_cycles * p (Loshchilov and Hutter 2017) ·
    warmup_stable_decay 1, then linear to 0 over the last `decay_share` of all steps (Hu et al. 2024, MiniCPM, with a
    linear end). inverse_sqrt is max(minimum_ratio, sqrt(w / step)), with w = 1 and step + 1 without a warm-up (Vaswani
    et al. 2017, 5.3). plateau has only the warm-up: multiply by `Plateau.scale`. Steps past the end stay at the floor.
    """
    assert min(step, total_steps - 1, warmup_steps) >= 0, (step, total_steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "inverse_sqrt":
        return max(minimum_ratio, math.sqrt(warmup_steps / step if warmup_steps else 1 / (step + 1)))
    after = step - warmup_steps
    length = max(1, total_steps - warmup_steps)
    shape = _shape(schedule, min(after, length), length, num_cycles, min(length, round(decay_share * total_steps)))
    return minimum_ratio + (1.0 - minimum_ratio) * shape


def _shape(schedule: Schedule, after: int, length: int, num_cycles: int, decay_steps: int) -> float:
    if schedule in ("constant", "plateau"):
        return 1.0
    if schedule == "linear":
        return (length - after) / length
    if schedule == "cosine":
        return _half_cosine(after / length)
    if schedule == "cosine_restarts":
        # Whole numbers up to the division: a restart falls on its step exactly.
        return _half_cosine(num_cycles * after % length / length) if after < length else 0.0
    assert schedule == "warmup_stable_decay", f"no schedule is called {schedule!r}"
    left = length - after
    return left / decay_steps if left < decay_steps else 1.0


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Plateau:
    """Lowers the learning rate when a validation metric stops improving; `scale` in [minimum_ratio, 1] is the factor.

    After more than `patience` observations in a row without a new best, scale := max(minimum_ratio, scale * factor)
    and counting starts anew: the rule of torch's `ReduceLROnPlateau` with threshold 0. A nan is no improvement.
    """

    def __init__(self, factor: float, patience: int, minimum_ratio: float, mode: Literal["min", "max"]) -> None:
        assert 0.0 < factor < 1.0, factor
        assert 0.0 <= minimum_ratio <= 1.0, minimum_ratio
        assert patience >= 0, patience
        self._factor = factor
        self._patience = patience
        self._minimum_ratio = minimum_ratio
        self._mode = mode
        self._best: float | None = None
        self._num_without_improvement = 0
        self.scale = 1.0

    def observe(self, metric: float) -> bool:
        """Take one validation's metric; whether the scale fell."""
        if self._improves(metric):
            self._best = metric
            self._num_without_improvement = 0
            return False
        self._num_without_improvement += 1
        if self._num_without_improvement <= self._patience:
            return False
        self._num_without_improvement = 0
        before = self.scale
        self.scale = max(self._minimum_ratio, before * self._factor)
        return self.scale < before

    def state_dict(self) -> dict[str, float | int | None]:
        """State for a checkpoint, as JSON."""
        return {
            "scale": self.scale,
            "best": self._best,
            "num_without_improvement": self._num_without_improvement,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.scale = float(state["scale"])
        self._best = None if state["best"] is None else float(state["best"])
        self._num_without_improvement = int(state["num_without_improvement"])

    def _improves(self, metric: float) -> bool:
        if not math.isfinite(metric):
            return False
        if self._best is None:
            return True
        return metric < self._best if self._mode == "min" else metric > self._best
