"""The log of one run: `events.jsonl` and its adapters behind one `write`.

A resumed run first checks the log against the checkpoint and truncates it to the checkpoint's position. Ranks other
than 0 write nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopos.config.aliases import current_settings
from loopos.config.variants import TRACKERS
from loopos.storage.durable import JSON
from loopos.storage.events import RESTORE, EventLog, EventLogError, EventWriter, TrackerWriter, read
from loopos.training.callbacks import Callbacks

_EVENTS, _CONFIG = "events.jsonl", "config.json"


@dataclass(frozen=True)
class WrittenLog:
    """What was logged up to a checkpoint. `settings`: the resolved config of the last session up to then; None if
    unknown. `warnings`: messages for the user.
    """

    path: Path
    offset: int
    settings: dict[str, Any] | None
    warnings: tuple[str, ...] = ()

    @classmethod
    def none(cls, run_dir: Path) -> WrittenLog:
        """The empty log of a new run."""
        return cls(run_dir / _EVENTS, 0, None)

    @classmethod
    def read(cls, run_dir: Path, offset: int, sha256: str | None) -> WrittenLog:
        """Reads the log up to a checkpoint and checks every line, so that a broken one does not end training later.
        sha256: of these bytes, if the checkpoint has it.

        Raises `EventLogError` for a log that is shorter than the checkpoint's position, and for a broken line.
        """
        path = run_dir / _EVENTS
        size = path.stat().st_size if path.is_file() else 0
        if size < offset:
            raise EventLogError(f"{path}: {size:,} bytes, but the checkpoint was saved at byte {offset:,}; {RESTORE}")
        settings, warnings = None, []
        if offset:
            if _byte(path, offset - 1) != b"\n":
                raise EventLogError(
                    f"{path}: no event ends at byte {offset:,}, where the checkpoint was saved; {RESTORE}"
                )
            for event in read(path, num_bytes=offset):
                if event["event"] == "session" and isinstance(event["metrics"].get("settings"), dict):
                    settings = event["metrics"]["settings"]
            if sha256 is not None and _sha256(path, offset) != sha256:
                warnings.append(
                    f"{path}: its first {offset:,} bytes are not what the run wrote (SHA-256 differs): curves and "
                    "report may be wrong; the weights are those of the checkpoint"
                )
        return cls(path, offset, settings or _config(run_dir / _CONFIG), tuple(warnings))


class RunLog:
    """Writes only after `open`, which only rank 0 calls. callbacks: receive each event after it is written."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._log: EventLog | None = None
        self._writers: list[EventWriter] = []

    def open(self, written: WrittenLog, *, trackers: Sequence[str], resumed_step: int | None) -> None:
        """written: the log is truncated to its end. trackers: names of the table, or "module:name". Raises
        `EventLogError`, `DiskFull` and `UserError`.
        """
        self._log = EventLog(written.path, self._callbacks or None)
        self._writers = [self._log]
        self._log.rewind(written.offset)
        for name in trackers:
            tracker = TRACKERS[name].load()
            self._writers.append(TrackerWriter(name, tracker, written.path.parent, resumed_step=resumed_step))

    def write(self, kind: str, step: int, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """One event. Raises `DiskFull`."""
        for writer in self._writers:
            writer.write(kind, step=step, metrics=metrics, timing=timing)

    def position(self) -> dict[str, int | str]:
        """For a checkpoint: the number of bytes so far and their SHA-256."""
        if self._log is None:
            return {"events_offset": 0}
        offset = self._log.offset()
        return {"events_offset": offset, "events_sha256": self._log.sha256(offset)}

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _byte(path: Path, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(index)
        return file.read(1)


def _sha256(path: Path, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (chunk := file.read(min(1 << 20, num_bytes))):
            digest.update(chunk)
            num_bytes -= len(chunk)
    return digest.hexdigest()


def _config(path: Path) -> dict[str, Any] | None:
    """The config that older versions wrote beside the log but not into it; None if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return current_settings(found) if isinstance(found, dict) else None
