"""What a person sees of a run: a bar with loss, tokens a second and time left on a terminal, plain lines elsewhere.

Enters: steps, validations, sentences. Leaves: text on standard error, so that standard output stays for answers. Left
out: the record of a run (`events.py`).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loopos.config.faults import printable

_LINE_EVERY_SECONDS = 10.0
_RATE_OVER_STEPS = 20


class RunProgress:
    """Shows one run. `quiet` shows nothing but warnings."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RATE_OVER_STEPS)
        self._last_line = 0.0
        self._total = 0

    def begin(self, total_steps: int, done: int) -> None:
        """A run of `total_steps` optimizer steps, of which `done` are behind it."""
        self._total = total_steps
        if not self.quiet and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.add_task("training", total=total_steps, completed=done, told="")
            self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """One optimizer step done: `tokens` real tokens in `seconds`."""
        self._recent.append((tokens, seconds))
        rate = sum(t for t, _ in self._recent) / max(1e-9, sum(s for _, s in self._recent))
        told = " ".join(f"{name} {value:.4f}" for name, value in losses.items()) + f" · {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, told=told)
        elif not self.quiet and (time.monotonic() - self._last_line > _LINE_EVERY_SECONDS or step == self._total):
            self._last_line = time.monotonic()
            left = (self._total - step) * sum(s for _, s in self._recent) / len(self._recent)
            self.console.print(f"step {step}/{self._total} · {told} · {left:,.0f} s left")

    def validation(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """One validation done."""
        told = " · ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"validation at step {step}: {told}{' · best' if best else ''}")

    def say(self, *sentences: str) -> None:
        """Each sentence on a line of its own."""
        for sentence in () if self.quiet else sentences:
            self.console.print(printable(sentence), markup=False)

    def warn(self, sentence: str) -> None:
        """A sentence that is shown even when quiet."""
        self.console.print(printable(sentence), markup=False, style="yellow" if sys.stderr.isatty() else None)

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
