"""What the board knows of a run's `events.jsonl`: a column of numbers per metric, and the few other events.

Enters: a log that a run may be writing, resuming or truncating. Leaves: tables of columns (`step`, `rollout`,
`validation`) and `notable`, every event but steps and rollouts. `update` reads only what is new. It keeps a CRC-32 of
each part that it has read: if a resumed run has truncated the log, only what follows the last unchanged part is read
again. `save` and `load` keep the columns of a long log in a cache, so that it is parsed once. Imports numpy, but
neither torch nor starlette.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from loopos.evaluation.run_outcome import FLAGS
from loopos.storage.events import parse_lines

Numbers: TypeAlias = NDArray[np.float64]
KINDS = ("step", "rollout", "validation")
"""The events with curves."""
STEP, TIME = "@step", "@time"
"""Columns of every table: the optimizer step, and the time of day in seconds since 1970."""
BLOCK_BYTES = 1 << 20
# Bytes before the position that must be unchanged: the end of an event, with its time of day.
_TAIL_BYTES = 128
# Below this a log is parsed faster than its cache is worth.
_WORTH_SAVING = 16 << 20
_VERSION = 1


class Table:
    """The numbers of one kind of event, a column per metric, NaN where an event has none."""

    def __init__(self) -> None:
        self.columns: dict[str, Numbers] = {}
        self.num_rows = 0

    def column(self, name: str) -> Numbers:
        """`[num_rows]`. What it returns never changes. Raises `KeyError` for an unknown name."""
        return self.columns[name][: self.num_rows]

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they were first logged."""
        return [name for name in self.columns if name not in (STEP, TIME)]

    def extend(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Adds a row per event."""
        columns = {STEP: _numbers([each["step"] for each in events])}
        columns[TIME] = _numbers([each["timing"].get("time") for each in events])
        for part in ("metrics", "timing"):
            rows = [each[part] for each in events]
            for name in dict.fromkeys(name for row in rows for name in row):
                if name in FLAGS or (part == "timing" and name == "time"):
                    continue
                values = _numbers([row.get(name) for row in rows])
                if name in self.columns or _holds_numbers(values, rows, name):
                    columns[name] = values
        after = self.num_rows + len(events)
        for name in dict.fromkeys([*self.columns, *columns]):
            self._put(name, columns.get(name), after)
        self.num_rows = after

    def _put(self, name: str, values: Numbers | None, after: int) -> None:
        held = self.columns.get(name)
        if held is None or len(held) < after:
            longer = np.full(max(after * 3 // 2, 64), np.nan)
            if held is not None:
                longer[: self.num_rows] = held[: self.num_rows]
            held = self.columns[name] = longer
        if values is not None:
            held[self.num_rows : after] = values

    def truncate(self, num_rows: int) -> None:
        """Drops the rows after the first `num_rows`, and the columns that only these had."""
        shorter = {name: values[:num_rows].copy() for name, values in self.columns.items() if num_rows}
        self.num_rows = num_rows
        self.columns = {
            name: values for name, values in shorter.items() if name in (STEP, TIME) or not np.isnan(values).all()
        }


def _numbers(values: Sequence[Any]) -> Numbers:
    """The values as numbers, NaN for what is none; the log writes nan and inf as text."""
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.array([_number(value) for value in values])
    return found if found.ndim == 1 else np.full(len(values), np.nan)


def _number(value: object) -> float:
    if isinstance(value, int | float):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else float("nan")


def _holds_numbers(values: Numbers, rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether these are a metric's: some number, or a NaN that was logged as such."""
    return not np.isnan(values).all() or any(row.get(name) == "nan" for row in rows)


@dataclass
class _Block:
    """A part of the log that has been read: where it ends, its CRC-32, and what was known at its end."""

    end: int
    crc: int
    num_lines: int
    num_rows: dict[str, int]
    num_notable: int


@dataclass
class EventIndex:
    """The events of one log so far. `version` grows with every change, also with a truncation."""

    path: Path
    tables: dict[str, Table] = field(default_factory=lambda: {kind: Table() for kind in KINDS})
    notable: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0
    _blocks: list[_Block] = field(default_factory=list)
    _tail: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def offset(self) -> int:
        """Bytes read so far: the end of a line."""
        return self._blocks[-1].end if self._blocks else 0

    @property
    def num_events(self) -> int:
        return self._blocks[-1].num_lines if self._blocks else 0

    @property
    def last_step(self) -> int:
        """The last optimizer step."""
        steps = [float(table.column(STEP)[-1]) for table in self.tables.values() if table.num_rows]
        return int(max([*(step for step in steps if step == step), *(each["step"] or 0 for each in self.notable), 0]))

    def update(self, *, most_bytes: int | None = None) -> bool:
        """Reads what is new, at most about `most_bytes`; whether there was anything. An incomplete last line is left
        for later. Raises `EventLogError` for a broken line, `OSError`.
        """
        with self._lock, self.path.open("rb") as file:
            before = self.version
            size = os.fstat(file.fileno()).st_size
            if not self._is_unchanged(file.fileno(), size):
                self._keep_unchanged_blocks(file.fileno())
                self.version += 1
            last = size if most_bytes is None else min(size, self.offset + max(most_bytes, BLOCK_BYTES))
            while self.offset < last and self._read_block(file.fileno()):
                self.version += 1
            return self.version != before

    def _is_unchanged(self, descriptor: int, size: int) -> bool:
        start = self.offset - len(self._tail)
        return size >= self.offset and os.pread(descriptor, len(self._tail), start) == self._tail

    def _keep_unchanged_blocks(self, descriptor: int) -> None:
        num_unchanged = 0
        for index, block in enumerate(self._blocks):
            start = self._blocks[index - 1].end if index else 0
            if zlib.crc32(os.pread(descriptor, block.end - start, start)) != block.crc:
                break
            num_unchanged += 1
        self._blocks = self._blocks[:num_unchanged]
        last = self._blocks[-1] if self._blocks else _Block(0, 0, 0, {}, 0)
        for kind, table in self.tables.items():
            table.truncate(last.num_rows.get(kind, 0))
        self.notable = self.notable[: last.num_notable]
        self._remember_tail(descriptor)

    def _read_block(self, descriptor: int) -> bool:
        """Reads about a MiB of whole lines; whether there were any."""
        start, size = self.offset, BLOCK_BYTES
        while True:
            data = os.pread(descriptor, size, start)
            end = data.rfind(b"\n") + 1
            if end or len(data) < size:
                break
            # A line longer than a block.
            size *= 2
        if not end:
            return False
        data = data[:end]
        lines = data[:-1].split(b"\n")
        self.add(parse_lines(lines, self.path, self.num_events + 1))
        self._grow_blocks(data, len(lines))
        self._remember_tail(descriptor)
        return True

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        """Adds events, without a position in the log."""
        by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        notable = []
        for event in events:
            kind = event["event"]
            if kind in by_kind and event["step"] is not None:
                by_kind[kind].append(event)
            if kind not in ("step", "rollout"):
                notable.append(event)
        for kind, found in by_kind.items():
            if found:
                self.tables[kind].extend(found)
        # A new list: a reader in another thread has the old one.
        self.notable = [*self.notable, *notable]

    def _grow_blocks(self, data: bytes, num_lines: int) -> None:
        """Adds to the last block while it is short: a live run is read line by line."""
        rows = {kind: table.num_rows for kind, table in self.tables.items()}
        last = self._blocks[-1] if self._blocks else None
        start = self._blocks[-2].end if len(self._blocks) > 1 else 0
        crc, lines = zlib.crc32(data), num_lines
        end = self.offset + len(data)
        if last is not None:
            lines += last.num_lines
            if last.end - start < BLOCK_BYTES // 2:
                crc = zlib.crc32(data, last.crc)
                self._blocks.pop()
        self._blocks.append(_Block(end, crc, lines, rows, len(self.notable)))

    def _remember_tail(self, descriptor: int) -> None:
        start = max(0, self.offset - _TAIL_BYTES)
        self._tail = os.pread(descriptor, self.offset - start, start)

    def save(self, folder: Path) -> None:
        """Stores what was read in `folder` for `load`, if the log is long enough. Raises `OSError`."""
        with self._lock:
            if self.offset < _WORTH_SAVING:
                return
            arrays: dict[str, NDArray[Any]] = {
                f"{kind}/{name}": table.column(name) for kind, table in self.tables.items() for name in table.columns
            }
            blocks = [[b.end, b.crc, b.num_lines, b.num_rows, b.num_notable] for b in self._blocks]
            text = json.dumps({"version": _VERSION, "blocks": blocks, "notable": self.notable})
            arrays["index"] = np.frombuffer(text.encode(), dtype=np.uint8)
            tail = np.frombuffer(self._tail, dtype=np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        file = self._cache_file(folder)
        partial = file.with_name(f"{file.stem}.partial-{os.getpid()}.npz")
        try:
            np.savez(partial, tail=tail, **arrays)  # type: ignore[arg-type]
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, folder: Path) -> bool:
        """Takes what `save` stored, if it is of this log; whether it was. `update` then reads the rest."""
        file = self._cache_file(folder)
        if not file.is_file():
            return False
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                index = json.loads(stored["index"].tobytes())
                if index["version"] != _VERSION:
                    return False
                columns = {name: stored[name] for name in stored.files if "/" in name}
                blocks = [_Block(*block) for block in index["blocks"]]
                tail, notable = stored["tail"].tobytes(), index["notable"]
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            # A cache of another version, or a damaged one: the log is read instead.
            return False
        with self._lock:
            for kind, table in self.tables.items():
                table.columns = {
                    name.partition("/")[2]: values for name, values in columns.items() if name.startswith(f"{kind}/")
                }
                table.num_rows = blocks[-1].num_rows.get(kind, 0)
            self._blocks, self._tail, self.notable = blocks, tail, notable
            self.version += 1
        return True

    def _cache_file(self, folder: Path) -> Path:
        return folder / f"{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:24]}.npz"


def cache_folder() -> Path:
    """Where the columns of long logs are stored: `loopos/board` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopos" / "board"
