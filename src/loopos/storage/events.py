"""The event log `events.jsonl`: one JSON line per event, the authoritative record of a run.

    {"event": "step", "step": 7, "metrics": {"loss": 0.5}, "timing": {"seconds": 0.1}}

`metrics` holds what a resumed run must repeat exactly, `timing` what depends on the clock. Resume truncates the log to
the offset in the checkpoint, so that it equals the log of the uninterrupted run except for timing and session events.
`TrackerWriter` has the same `write`. `read` is the one reader: resuming, reports and `loopos runs` get every event from
it, under the names of today. torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from loopos.config.aliases import current_key, current_settings
from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.extras import install_command
from loopos.config.own_function import OwnFunction
from loopos.storage.durable import JSON, append_whole, end_of_last_line, explain_disk_full
from loopos.storage.json_files import json_text

FINGERPRINTED_EVENTS = ("step", "validation")
EVENT_NAMES: Mapping[str, str] = {"alarm": "alert"}
METRIC_NAMES: Mapping[str, str] = {"end_share": "eos_rate", "centring": "center_rewards"}
"""Names in the logs of older versions → names of today."""
_KEYS = frozenset({"event", "step", "metrics", "timing"})
# Without these texts `current` changes nothing.
_MAY_CHANGE = (*(f'"{name}"'.encode() for name in (*EVENT_NAMES, *METRIC_NAMES)), b'"settings"', b'"changed"')
_CHUNK_BYTES = 65536
RESTORE = "restore the log that belongs to this checkpoint, or start in another output_dir"


class EventLogError(UserError):
    """The event log was damaged or changed; the message names the file and the line or byte."""


class EventWriter(Protocol):
    """Interface of event receivers: the log and every tracker."""

    def write(self, kind: str, *, step: int | None, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """Record one event."""

    def close(self) -> None:
        """Flush and close."""


class EventLog:
    """Append-only JSON lines. Each line is written at once, so that a killed process loses none.

    Opening drops an incomplete last line (power cut, full disk); `torn_bytes` is its size. `watch` is called
    with each event after it is written. Raises `DiskFull`.
    """

    def __init__(self, path: Path, watch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self._watch = path, watch
        with self._explain_disk_full(0):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            self.torn_bytes = size - end_of_last_line(self._descriptor, size)
            if self.torn_bytes:
                os.ftruncate(self._descriptor, size - self.torn_bytes)
        self._hashed, self._digest = 0, hashlib.sha256()

    def write(self, kind: str, *, step: int | None, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """Append one event; nan and inf become the strings "nan", "inf" and "-inf". Raises `DiskFull`."""
        event = {"event": kind, "step": step, "metrics": finite(metrics), "timing": finite(timing)}
        line = json_text(event, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._explain_disk_full(len(line)):
            append_whole(self._descriptor, line)
        if self._watch is not None:
            self._watch(json.loads(line))

    def offset(self) -> int:
        """Sync the log and return its size in bytes, which a checkpoint stores for `rewind`. Raises `DiskFull`."""
        with self._explain_disk_full(0):
            os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def sha256(self, offset: int) -> str:
        """SHA-256 (hexadecimal) of the first `offset` bytes; calls with growing offsets read each byte only once."""
        if offset < self._hashed:
            self._hashed, self._digest = 0, hashlib.sha256()
        while self._hashed < offset:
            chunk = os.pread(self._descriptor, min(_CHUNK_BYTES, offset - self._hashed), self._hashed)
            assert chunk, f"{self.path} is shorter than {offset:,} bytes"
            self._digest.update(chunk)
            self._hashed += len(chunk)
        return self._digest.hexdigest()

    def rewind(self, offset: int) -> None:
        """Drop all events after `offset`. Raises `EventLogError` if the log is shorter or no line ends there,
        `DiskFull`.
        """
        size = os.fstat(self._descriptor).st_size
        if offset > size:
            raise EventLogError(
                f"{self.path}: {size:,} bytes, but the checkpoint was saved at byte {offset:,}; {RESTORE}"
            )
        if offset > 0 and os.pread(self._descriptor, 1, offset - 1) != b"\n":
            raise EventLogError(
                f"{self.path}: no event ends at byte {offset:,}, where the checkpoint was saved; {RESTORE}"
            )
        with self._explain_disk_full(0):
            os.ftruncate(self._descriptor, offset)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; nothing is buffered."""
        os.close(self._descriptor)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _explain_disk_full(self, needed_bytes: int) -> AbstractContextManager[None]:
        return explain_disk_full(self.path, needed_bytes, "an event" if needed_bytes else "the event log")


class TensorBoardTracker:
    """TensorBoard files in the folder `tensorboard` of the run (extra track).

    `resumed_step` hides what an earlier process wrote from that step on. Raises `MissingRequirement` if the extra is
    missing.
    """

    def __init__(self, run_dir: Path, *, resumed_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise MissingRequirement(
                f"training.trackers: tensorboard cannot be imported ({error}); run\n  {install_command('track')}"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one event."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class TrackerWriter:
    """Passes the numbers among metrics and timings to a tracker, as `kind/name`.

    Events without a step and values that are not numbers are skipped.
    """

    def __init__(self, name: str, tracker: type[Any], run_dir: Path, *, resumed_step: int | None = None) -> None:
        """name: of the tracker, for messages. tracker: called as `tracker(run_dir, resumed_step=...)`. Raises
        `UserError` where it cannot be made.
        """
        about = f"the run in {run_dir}"
        made = OwnFunction(f"tracker {name}", tracker)(run_dir, resumed_step=resumed_step, about=about)
        self._log, self._close = (
            OwnFunction(f"tracker {name}, {method}", _method(made, name, method)) for method in ("log", "close")
        )
        self._about = about

    def write(self, kind: str, *, step: int | None, metrics: Mapping[str, JSON], timing: Mapping[str, float]) -> None:
        """Record the numbers of one event. Raises `UserError` for what the tracker raises."""
        if step is None:
            return
        # "time" is the time of day, which trackers record themselves.
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in {**metrics, **timing}.items()
            if name != "time" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._log(step, numbers, about=f"step {step} of {self._about}")

    def close(self) -> None:
        """Flush and close."""
        self._close(about=self._about)


def _method(tracker: object, name: str, method: str) -> Callable[..., Any]:
    found = getattr(tracker, method, None)
    if not callable(found):
        raise UserError(f"tracker {name}: it has no method {method}; expected log(step, metrics) and close()")
    bound: Callable[..., Any] = found
    return bound


def read(path: Path, *, num_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events in order as `current` names them, only of the first `num_bytes` if set.

    An incomplete last line is skipped; a broken line elsewhere raises `EventLogError`.
    """
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            if not line.endswith(b"\n") or (num_bytes is not None and position > num_bytes):
                return
            yield _parsed(line, path, number)


def parse_lines(lines: Sequence[bytes], path: Path, first: int) -> list[dict[str, Any]]:
    """The events of whole lines, as `current` names them; `first`: the number of the first line, from 1.

    For who follows a log and keeps its position. The lines are parsed as one JSON array, which takes 0.6 of the
    time of one by one. Raises `EventLogError` for a broken line.
    """
    text = b"[" + b",".join(lines) + b"]"
    try:
        events = json.loads(text)
    except (ValueError, RecursionError):
        events = []
    if len(events) != len(lines) or not all(map(_is_event, events)):
        return [_parsed(line, path, number) for number, line in enumerate(lines, start=first)]
    return [current(event) for event in events] if any(name in text for name in _MAY_CHANGE) else events


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _broken(path, number, f"({error})") from error
    if not _is_event(event):
        raise _broken(path, number, f"(keys: expected {', '.join(sorted(_KEYS))})")
    return current(event)


def _is_event(event: object) -> bool:
    return isinstance(event, dict) and event.keys() >= _KEYS and isinstance(event["metrics"], dict)


def current(event: dict[str, Any]) -> dict[str, Any]:
    """An event of any version, with its kind, metrics and settings under the names of today. A metric that already has
    its name of today keeps its value.
    """
    written = event["metrics"]
    metrics = {current_metric(name): value for name, value in written.items() if METRIC_NAMES.get(name) not in written}
    if isinstance(metrics.get("settings"), dict):
        metrics["settings"] = current_settings(metrics["settings"])
    if isinstance(metrics.get("changed"), dict):
        metrics["changed"] = {current_key(key): values for key, values in metrics["changed"].items()}
    kind = EVENT_NAMES.get(event["event"], event["event"])
    if kind == "alert":
        metrics["name"] = current_metric(str(metrics["name"]))
    return {**event, "event": kind, "metrics": metrics}


def current_metric(name: str) -> str:
    """The name of a metric today."""
    return METRIC_NAMES.get(name, name)


def _broken(path: Path, number: int, why: str) -> EventLogError:
    return EventLogError(
        f"{path}:{number}: not an event {why}; the file was changed after the run wrote it: restore it, or start in "
        "another output_dir"
    )


def fingerprint(path: Path) -> str:
    """SHA-256 (hexadecimal) of the step and validation events without timing; equal for equal runs."""
    digest = hashlib.sha256()
    for event in read(path):
        if event["event"] in FINGERPRINTED_EVENTS:
            deterministic = [event["event"], event["step"], event["metrics"]]
            digest.update(json.dumps(deterministic, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def finite(value: JSON) -> JSON:
    """The value with nan and inf as the texts "nan", "inf" and "-inf", which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
