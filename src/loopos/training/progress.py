"""What a run shows (a progress bar on a terminal or in a notebook, plain lines elsewhere), and `samples.jsonl`, the
sampled outputs of each validation.

Text goes to standard error; standard output is reserved for results. `events.py` keeps the record of a run.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from html import escape
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
# Characters per line without a terminal.
_LINE_WIDTH = 120
# A notebook's server sends each change to the browser.
_NOTEBOOK_EVERY_SECONDS = 0.5
_NOTEBOOK_METRICS = 8


class RunProgress:
    """Displays one run. `quiet` shows only warnings."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RATE_OVER_STEPS)
        # Wall time of each step including validation etc., to estimate the time left.
        self._spent: deque[float] = deque(maxlen=_RATE_OVER_STEPS)
        self._last_step = self._last_line = 0.0
        self._total = 0
        self._notebook: NotebookDisplay | None = None
        self._notebook_text: NotebookText | None = None

    def begin(self, total_steps: int, completed: int) -> None:
        """Starts the display of a run with `total_steps` optimizer steps, `completed` of them done."""
        self._total = total_steps
        self._last_step = time.monotonic()
        if not self.quiet and self.console.is_jupyter:
            # Later lines come below the bar.
            self._notebook, self._notebook_text = NotebookDisplay(total_steps, completed), None
        elif not self.quiet and self.console.is_terminal:
            still = Column(no_wrap=True)
            columns = (
                TextColumn("{task.description}", table_column=still),
                BarColumn(bar_width=_BAR_WIDTH),
                MofNCompleteColumn(table_column=still),
                _TimeLeft(table_column=still),
                TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.add_task(
                "training", total=total_steps, completed=completed, metrics="", seconds_left=None, at=0.0
            )
            self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Displays one finished step with `tokens` real tokens in `seconds`."""
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
        elif self._notebook is not None:
            self._notebook.step(step, " · ".join([*named, speed, f"{_as_clock(left)} left"]))
        elif not self.quiet and (now - self._last_line > _LINE_EVERY_SECONDS or step == self._total):
            self._last_line = now
            opening, closing = f"step {step}/{self._total}", f"{speed} · {_as_clock(left)} left"
            shown = _fitting(named, _LINE_WIDTH - len(opening) - len(closing) - 6, " ")
            self.console.print(" · ".join([opening, *([" ".join(shown)] if shown else []), closing]))

    def validation(self, step: int, metrics: Mapping[str, float], verdict: str, *, first: str | None = None) -> None:
        """Displays one validation. verdict: its meaning for the run, or "". first: the deciding metric, shown first;
        other metrics follow as long as they fit on the line.
        """
        shown_once = once(metrics)
        order = [first, *shown_once] if first is not None and first in metrics else list(shown_once)
        if self._notebook is not None:
            self._notebook.validation(step, {name: metrics[name] for name in order}, verdict)
            return
        named = [f"{name} {figure(metrics[name])}" for name in dict.fromkeys(order)]
        opening, closing = f"validation at step {step}: ", f" · {verdict}" if verdict else ""
        shown = _fitting(named, _LINE_WIDTH - len(opening) - len(closing), " · ")
        self.say(f"{opening}{' · '.join(shown)}{closing}")

    def say(self, *sentences: str) -> None:
        """Prints each sentence on its own line, unless quiet."""
        if self.console.is_jupyter and not self.quiet and sentences:
            self._notebook_text = self._notebook_text or NotebookText()
            self._notebook_text.add(*sentences)
            return
        for sentence in () if self.quiet else sentences:
            self.console.print(printable(sentence), markup=False)

    def warn(self, sentence: str) -> None:
        """Prints a sentence even when quiet."""
        self._notebook_text = None
        self.console.print(printable(sentence), markup=False, style="yellow" if sys.stderr.isatty() else None)

    def end(self) -> None:
        """Removes the bar of a terminal; a notebook keeps what it shows."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._notebook is not None:
            self._notebook.end()
            self._notebook = None


class NotebookDisplay:
    """A run in a notebook: a progress bar and a table of its validations, in one output that changes in place.

    Written without rich, whose live displays need ipywidgets and leave nothing in a notebook that is opened again.
    """

    def __init__(self, total_steps: int, completed: int) -> None:
        from IPython.display import HTML, display

        self._as_html, self._total, self._completed, self._text = HTML, total_steps, completed, ""
        self._validations: list[tuple[int, Mapping[str, float], str]] = []
        self._shown_at = time.monotonic()
        self._handle = display(HTML(self._html()), display_id=True)

    def step(self, step: int, text: str) -> None:
        """Shows a finished step, if the last change is long enough ago."""
        self._completed, self._text = step, text
        if time.monotonic() - self._shown_at > _NOTEBOOK_EVERY_SECONDS:
            self._update()

    def validation(self, step: int, metrics: Mapping[str, float], verdict: str) -> None:
        """Adds a row to the table. metrics: the most important first."""
        self._validations.append((step, metrics, verdict))
        self._update()

    def end(self) -> None:
        """Shows the last state."""
        self._update()

    def _update(self) -> None:
        self._shown_at = time.monotonic()
        self._handle.update(self._as_html(self._html()))

    def _html(self) -> str:
        bar = f'<progress value="{self._completed}" max="{self._total}" style="width:20em"></progress>'
        line = f"<div>{bar} step {self._completed}/{self._total} {escape(self._text)}</div>"
        names = list(dict.fromkeys(name for _, metrics, _ in self._validations for name in metrics))[:_NOTEBOOK_METRICS]
        if not names:
            return line
        head = "".join(f"<th>{escape(name)}</th>" for name in ("step", *names, ""))
        rows = []
        for step, metrics, verdict in self._validations:
            cells = [str(step), *(figure(metrics[name]) if name in metrics else "" for name in names), verdict]
            rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        return f"{line}<table><tr>{head}</tr>{''.join(rows)}</table>"


class NotebookText:
    """Lines in a notebook, in one output that grows: rich makes an output of each."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._as_html, self._lines = HTML, list[str]()
        self._handle = display(HTML(""), display_id=True)

    def add(self, *lines: str) -> None:
        """Adds lines at the end."""
        self._lines += map(printable, lines)
        self._handle.update(self._as_html(f"<pre>{escape(chr(10).join(self._lines))}</pre>"))


class _TimeLeft(ProgressColumn):
    """Time left by the wall time of the last steps; counts down between steps. Rich's own column loses its estimate if
    a step takes longer than its window of 30 seconds.
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
    """The leading entries of `named` that fit into `room` characters, with `between` before each."""
    shown: list[str] = []
    for each in named:
        room -= len(each) + len(between)
        if room < 0:
            break
        shown.append(each)
    return shown


def write_samples(file: Path, step: int, records: Iterable[Mapping[str, JSON]]) -> None:
    """Appends the records of a step. Lines of this step or later, left by a killed run, are dropped; a resumed run
    writes them again. The file is replaced atomically. Raises `DiskFull`, and `UserError` for a broken file.
    """
    earlier = [line for at, line in _written(file) if at < step]
    lines = [*earlier, *(json_text({"step": step, **record}) for record in records)]
    with explain_disk_full(file, sum(map(len, lines)), "the samples"):
        write_whole(file, "".join(f"{line}\n" for line in lines).encode())


def _written(file: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of the existing file."""
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
