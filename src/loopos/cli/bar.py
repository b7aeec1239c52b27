"""A bar for work on many tensors or models: how many are done, and which is next.

Enters: counts. Leaves: a bar on standard error where that is a terminal, nothing elsewhere. Left out: a training's
progress (`training.progress`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives what is told (done, total, name of the next): it draws the bar of `what`."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, name="")

        def tell(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, name=name)

        yield tell


def _silent(done: int, total: int, name: str) -> None:
    """Draws nothing."""
