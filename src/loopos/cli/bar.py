"""A bar of progress on a terminal, lines elsewhere.

Enters: things done and in all, sentences. Leaves: text on standard error. Left out: the bar of a training
(`training.progress`).
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


class Bar:
    """`with Bar("blocks") as bar:` shows `bar.progress(done, whole)`; what is counted is named once."""

    def __init__(self, counted: str) -> None:
        self._counted = counted
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            columns = (
                TextColumn(self._counted),
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

    def progress(self, done: int, whole: int, name: str = "") -> None:
        """So many of so many are done, and which is next; done starts over with each new count."""
        if self._bar is not None:
            if not self._bar.task_ids or done <= 1:
                for task in list(self._bar.task_ids):
                    self._bar.remove_task(task)
                self._bar.add_task(self._counted, total=whole, name="")
            self._bar.update(self._bar.task_ids[0], completed=done, name=name)
        elif time.monotonic() - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self._counted} {done}/{whole}")

    def say(self, sentence: str) -> None:
        """A sentence on a line of its own."""
        self._console.print(sentence, markup=False)
