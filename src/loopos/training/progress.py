"""What a person sees of a run: a bar with time left, losses and tokens a second on a terminal, plain lines elsewhere.

Enters: steps, validations, sentences. Leaves: text on standard error, so that standard output stays for answers. Left
out: the record of a run (`events.py`).

What a model said at each validation: `samples.jsonl`, a line a problem.

Enters: a step and records. Leaves: the file, with the steps before and this one. Left out: what a record holds.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from loopos.config.diagnostics import UserError, printable
from loopos.config.figures import figure, once
from loopos.storage.durable import JSON, explain_disk_full, write_whole
from loopos.storage.json_files import json_text

_LINE_EVERY_SECONDS = 10.0
_RATE_OVER_STEPS = 20
_BAR_WIDTH = 20
# "training", the bar, the time left and the spaces between; the count comes on top.
_FIXED_WIDTH = len("training") + _BAR_WIDTH + len("0:00:00") + 4
# Characters of a line where there is no terminal.
_LINE_WIDTH = 120


class RunProgress:
    """Shows one run. `quiet` shows nothing but warnings."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RATE_OVER_STEPS)
        # Wall time of each step with what belongs to it, such as validation: the time left is reckoned with it.
        self._spent: deque[float] = deque(maxlen=_RATE_OVER_STEPS)
        self._last_step = self._last_line = 0.0
        self._total = 0

    def begin(self, total_steps: int, done: int) -> None:
        """A run of `total_steps` optimizer steps, of which `done` are behind it."""
        self._total = total_steps
        self._last_step = time.monotonic()
        if not self.quiet and self.console.is_terminal:
            still = Column(no_wrap=True)
            columns = (
                TextColumn("{task.description}", table_column=still),
                BarColumn(bar_width=_BAR_WIDTH),
                MofNCompleteColumn(table_column=still),
                _TimeLeft(table_column=still),
                TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.add_task("training", total=total_steps, completed=done, metrics="", seconds_left=None, at=0.0)
            self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """One optimizer step done: `tokens` real tokens in `seconds`."""
        now = time.monotonic()
        self._spent.append(now - self._last_step)
        self._last_step = now
        self._recent.append((tokens, seconds))
        rate = sum(t for t, _ in self._recent) / max(1e-9, sum(s for _, s in self._recent))
        left = (self._total - step) * sum(self._spent) / len(self._spent)
        named = [f"{name} {value:.4f}" for name, value in losses.items()]
        speed = f"{rate:,.0f} tokens/s"
        if self._bar is not None:
            room = self.console.width - _FIXED_WIDTH - 2 * len(str(self._total)) - 2
            metrics = " ".join([speed, *_fitting(named, room - len(speed), " ")])
            self._bar.update(self._bar.task_ids[0], completed=step, metrics=metrics, seconds_left=left, at=now)
        elif not self.quiet and (now - self._last_line > _LINE_EVERY_SECONDS or step == self._total):
            self._last_line = now
            opening, closing = f"step {step}/{self._total}", f"{speed} · {_as_clock(left)} left"
            shown = _fitting(named, _LINE_WIDTH - len(opening) - len(closing) - 6, " ")
            self.console.print(" · ".join([opening, *([" ".join(shown)] if shown else []), closing]))

    def validation(self, step: int, metrics: Mapping[str, float], verdict: str, *, first: str | None = None) -> None:
        """One validation done. verdict: what it means for the run, "" for nothing. first: the metric that decides,
        which stands first; of the others as many as a line holds.
        """
        shown_once = once(metrics)
        order = [first, *shown_once] if first is not None and first in metrics else list(shown_once)
        named = [f"{name} {figure(metrics[name])}" for name in dict.fromkeys(order)]
        opening, closing = f"validation at step {step}: ", f" · {verdict}" if verdict else ""
        shown = _fitting(named, _LINE_WIDTH - len(opening) - len(closing), " · ")
        self.say(f"{opening}{' · '.join(shown)}{closing}")

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


class _TimeLeft(ProgressColumn):
    """The time left by the last steps' wall time, running down between two steps however long they take. Rich's own
    column forgets its estimate where a step takes longer than its window of 30 seconds.
    """

    def render(self, task: Task) -> Text:
        seconds: float | None = task.fields["seconds_left"]
        if seconds is None:
            # No step is done yet.
            return Text("…".rjust(7), style="progress.remaining")
        left = max(0.0, seconds - (time.monotonic() - task.fields["at"]))
        return Text(_as_clock(left).rjust(7), style="progress.remaining")


def _as_clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _fitting(named: Iterable[str], room: int, between: str) -> list[str]:
    """The first of `named` that fit into `room` characters with `between` before each."""
    shown: list[str] = []
    for each in named:
        room -= len(each) + len(between)
        if room < 0:
            break
        shown.append(each)
    return shown


def write_samples(file: Path, step: int, records: Iterable[Mapping[str, JSON]]) -> None:
    """Puts the records of a step behind those of earlier ones. Lines of this step or later, as a killed run leaves
    them, go: a resumed run writes them again. The file is replaced at once. Raises `DiskFull`, and `UserError` for a
    file that is broken.
    """
    earlier = [line for at, line in _written(file) if at < step]
    lines = [*earlier, *(json_text({"step": step, **told}) for told in records)]
    with explain_disk_full(file, sum(map(len, lines)), "the samples"):
        write_whole(file, "".join(f"{line}\n" for line in lines).encode())


def _written(file: Path) -> Iterator[tuple[int, str]]:
    """Step and line of what is there."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            text = line.decode()
            yield int(json.loads(text)["step"]), text
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(
                f"{file}:{number}: not a sample of this run ({problem}); it was changed after the run wrote it: "
                "restore it, or move it away"
            ) from problem
