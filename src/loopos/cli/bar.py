"""A progress bar on a terminal, progress lines elsewhere; both on standard error."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


class Bar:
    """`with Bar("blocks") as bar:` shows `bar.progress(completed, total)`; `unit` names what is counted."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            columns = (
                TextColumn(self._unit),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[name]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, completed: int, total: int, name: str = "") -> None:
        """Shows `completed` of `total` and the name of the current item; restarts when `completed` is 1 or less."""
        if self._bar is not None:
            if not self._bar.task_ids or completed <= 1:
                for task in list(self._bar.task_ids):
                    self._bar.remove_task(task)
                self._bar.add_task(self._unit, total=total, name="")
            self._bar.update(self._bar.task_ids[0], completed=completed, name=name)
        elif time.monotonic() - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self._unit} {completed}/{total}")

    def say(self, line: str) -> None:
        """Prints a line of its own."""
        self._console.print(line, markup=False)
