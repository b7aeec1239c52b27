"""The log of one run: `events.jsonl` and its adapters behind one `write`.

Enters: events. Leaves: the log, cut back to a checkpoint's place at resume. Ranks other than the first write nothing.
Left out: the file itself (`events.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loopos.storage.durable import JSON
from loopos.training.events import EventLog, EventWriter, TensorBoardAdapter


class RunLog:
    """Opened by `open`; before that, and on other ranks than the first, writing does nothing."""

    def __init__(self) -> None:
        self._log: EventLog | None = None
        self._writers: list[EventWriter] = []

    def open(self, run_dir: Path, *, offset: int, tensorboard: bool, resumed_step: int | None) -> None:
        """offset: byte that the log is cut back to, 0 for a new run. Raises `EventLogError`."""
        self._log = EventLog(run_dir / "events.jsonl")
        self._writers = [self._log]
        self._log.rewind(offset)
        if tensorboard:
            self._writers.append(TensorBoardAdapter(run_dir / "tensorboard", resumed_step=resumed_step))

    def write(self, kind: str, step: int, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """One event. Raises `DiskFull`."""
        for writer in self._writers:
            writer.write(kind, step=step, metrics=metrics, timing=timing)

    def offset(self) -> int:
        """Bytes so far, for a checkpoint."""
        return self._log.offset() if self._log is not None else 0

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
