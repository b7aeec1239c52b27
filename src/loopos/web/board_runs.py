"""The runs of a folder as the board shows them: found, followed, and summed up.

Enters: a folder. Leaves: for each run an `EventIndex` that follows its log and a snapshot, a JSON object with state,
progress and speed. `Board.follow` runs in a thread of its own; requests only read. A run is known by an id made from
its path, so that no path of a request is ever opened. What a symbolic link leads out of the folder is not read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from loopos.config.diagnostics import UserError
from loopos.evaluation.run_folder import CONFIG, EVENTS, ROLLOUTS, SAMPLES, RunFolder, find_runs
from loopos.storage.events import EventLogError, parse_lines
from loopos.storage.folder_lock import LOCK, LockState, lock_state
from loopos.storage.json_files import read_object, save_json
from loopos.web.event_index import STEP, TIME, EventIndex
from loopos.web.page import Context
from loopos.web.security import inside

ANSWER_FILES = {"samples": SAMPLES, "rollouts": ROLLOUTS}
"""Stored answers to the validation prompts and to those of training → their file."""
# Seconds between two looks at the logs, at the locks, and at the folder for new runs.
_LOOK, _LOOK_AT_LOCKS, _LOOK_FOR_RUNS = 0.5, 2.0, 5.0
# Bytes of one log that are read before the others get their turn.
_TURN_BYTES = 8 << 20
# Steps over which speed is measured: recent, and enough to be steady.
_RECENT = 50
_COLORS = 12
# A log above this that has not been read yet is first shown by lines sampled from it.
_SAMPLED_BYTES, _SAMPLED_LINES, _LINE_BYTES = 32 << 20, 600, 16384
# The metrics that the list shows, most important first.
_HEADLINES = ("accuracy", "micro_f1", "mae", "pair_accuracy", "step_accuracy", "win_rate", "reward", "loss")
MOST_NOTE, MOST_TAGS, MOST_TAG = 20_000, 32, 64


@dataclass
class BoardRun:
    """One run. `snapshot` is replaced whenever it changes; `saved`: bytes of the log in the cache; `problem`: why its
    log cannot be read, "" if it can.
    """

    id: str
    name: str
    folder: Path
    index: EventIndex
    color: int = 0
    size: int = 0
    saved: int = 0
    problem: str = ""
    snapshot: dict[str, Any] = field(default_factory=dict)
    preview: EventIndex | None = None
    _seen: tuple[int, int, int] = (-1, -1, -1)

    @property
    def shown(self) -> EventIndex:
        """What is drawn: the events read so far, or lines sampled from all while few have been read."""
        is_read = self.index.offset * 2 >= self.size or self.preview is None
        return self.index if is_read else self.preview or self.index

    def look(self, root: Path) -> bool:
        """Reads what is new in the log; whether anything changed, or more is left."""
        log = self.index.path
        if not inside(root, log):
            return self._fails(f"{log.name} leads out of the folder")
        try:
            status = log.stat()
            seen = (status.st_size, status.st_mtime_ns, status.st_ino)
            if seen == self._seen:
                return False
            self.size = status.st_size
            if self.preview is None and status.st_size - self.index.offset > _SAMPLED_BYTES:
                self.preview = sampled(log, status.st_size)
                return True
            changed = self.index.update(most_bytes=_TURN_BYTES)
        except EventLogError as problem:
            self._seen = seen
            return self._fails(str(problem))
        except OSError as problem:
            return self._fails(str(problem))
        # An incomplete last line is left: the same size need not be read again.
        if not changed or self.index.offset == status.st_size:
            self._seen = seen
        self.problem = ""
        return changed

    def _fails(self, problem: str) -> bool:
        changed, self.problem = self.problem != problem, problem
        return changed


def sampled(log: Path, size: int) -> EventIndex:
    """An index of lines at equal distances, and of the first and the last, of a log that is too long to be read at
    once. Raises `EventLogError`, `OSError`.
    """
    index = EventIndex(log)
    lines = []
    with log.open("rb") as file:
        lines += file.readlines(_LINE_BYTES)[:1]
        for start in np.linspace(_LINE_BYTES, max(_LINE_BYTES, size - _LINE_BYTES), _SAMPLED_LINES).astype(int):
            file.seek(start)
            file.readline(4 * _LINE_BYTES)
            lines.append(file.readline(4 * _LINE_BYTES))
    whole = [line for line in lines if line.endswith(b"\n")]
    index.add(parse_lines(whole, log, 1))
    return index


class Board:
    """The runs of a folder."""

    def __init__(self, context: Context) -> None:
        self.root, self._context = context.root, context
        self.runs: dict[str, BoardRun] = {}
        self.version = 0
        self._next_search = self._next_locks = 0.0

    def follow(self) -> None:
        """Looks for runs and reads their logs until the app stops."""
        while not self._context.closing.is_set():
            if not self.look():
                self._context.closing.wait(_LOOK)

    def look(self) -> bool:
        """One look at everything that is due; whether a log has more to read."""
        now = time.monotonic()
        if now >= self._next_search:
            self._search()
            self._next_search = now + _LOOK_FOR_RUNS
        looks_at_locks = now >= self._next_locks
        if looks_at_locks:
            self._next_locks = now + _LOOK_AT_LOCKS
        is_behind = False
        # Short logs first, so that most runs are there at once.
        for run in sorted(self.runs.values(), key=lambda each: each.size - each.index.offset):
            changed = run.look(self.root)
            if changed or looks_at_locks or not run.snapshot:
                self._put_snapshot(run)
            if changed and run.index.offset == run.size and run.size - run.saved > _TURN_BYTES:
                self._save(run)
            is_behind = is_behind or (changed and run.index.offset < run.size)
        return is_behind

    def _save(self, run: BoardRun) -> None:
        """Keeps the columns of a long log; without them it is only parsed again."""
        if self._context.cache is not None:
            try:
                run.index.save(self._context.cache)
                run.saved = run.index.offset
            except OSError as problem:
                # A full or read-only disk must not stop the board; the log is only parsed again.
                logging.getLogger("uvicorn.error").warning("%s: curves are not cached", problem)

    def _search(self) -> None:
        try:
            folders = find_runs(self.root)
        except UserError:
            folders = []
        found = {run_id(self.root, folder): folder for folder in folders}
        for key in [key for key in self.runs if key not in found]:
            del self.runs[key]
            self._note_change()
        for key, folder in found.items():
            if key not in self.runs:
                index = EventIndex(folder / EVENTS)
                if self._context.cache is not None and inside(self.root, index.path):
                    index.load(self._context.cache)
                name = folder.relative_to(self.root).as_posix()
                self.runs[key] = BoardRun(
                    key, self.root.name if name == "." else name, folder, index, saved=index.offset
                )
        self._give_colors()

    def _give_colors(self) -> None:
        """A color by the run's id, or the next free one; the second dozen are dashed. The oldest runs choose first, so
        that a new run changes none.
        """
        taken: set[int] = set()
        for run in sorted(self.runs.values(), key=_age):
            start = int(run.id, 16) % _COLORS
            dashed = _COLORS if len(taken) >= _COLORS else 0
            order = [dashed + (start + step) % _COLORS for step in range(_COLORS)]
            run.color = next((color for color in order if color not in taken), order[0])
            taken.add(run.color)

    def _put_snapshot(self, run: BoardRun) -> None:
        snapshot = snapshot_of(run, self.root)
        if snapshot != run.snapshot:
            run.snapshot = snapshot
            self._note_change()

    def _note_change(self) -> None:
        self.version += 1

    def of(self, key: str) -> BoardRun:
        """The run with this id. Raises `KeyError`."""
        return self.runs[key]

    def write_note(self, run: BoardRun, note: str, tags: Sequence[str]) -> None:
        """Stores note and tags in a file beside the run's folder. Raises `UserError`."""
        save_json(_notes_file(run, self.root), {"note": note, "tags": list(tags)})
        self._put_snapshot(run)


def run_id(root: Path, folder: Path) -> str:
    """12 hexadecimal digits from a run's path in the root."""
    return hashlib.sha256(folder.relative_to(root).as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _age(run: BoardRun) -> tuple[float, str]:
    try:
        return (run.folder / CONFIG).stat().st_mtime, run.id
    except OSError:
        return 0.0, run.id


def folder_of(run: BoardRun, root: Path) -> RunFolder:
    """The run as its files describe it, without its steps. Raises `UserError` for a config out of the root."""
    if not inside(root, run.folder / CONFIG):
        raise UserError(f"{run.name}: {CONFIG} leads out of the folder that the board shows")
    return RunFolder(run.folder, events=run.shown.notable)


def snapshot_of(run: BoardRun, root: Path) -> dict[str, Any]:
    """What the list of runs shows."""
    index = run.shown
    note = read_note(run, root)
    found: dict[str, Any] = {
        "id": run.id,
        "name": run.name,
        "color": run.color,
        "version": index.version,
        "read": 1.0 if not run.size else min(1.0, run.index.offset / run.size),
        "problem": run.problem,
        "answers": [kind for kind, name in ANSWER_FILES.items() if (run.folder / name).is_file()],
        **note,
    }
    try:
        described = folder_of(run, root)
        lock = lock_state(run.folder) if inside(root, run.folder / LOCK) else None
        found |= _progress(described, index)
        found |= {"state": described.state, "status": described.status, "method": described.method}
        found |= {"ended": described.ended, "headline": _headline(described), "best_step": described.best_step}
        found |= _process(lock)
        if described.state == "running":
            found |= _speed(index, found["total_steps"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as problem:
        # A config or an event that another program has written or changed: the list shows it with what is wrong.
        found |= {"state": "unknown", "status": "unreadable", "method": "", "step": index.last_step}
        found["problem"] = found["problem"] or f"cannot be read: {problem}"
    return found


def _progress(run: RunFolder, index: EventIndex) -> dict[str, Any]:
    steps = index.tables["step"]
    rates = steps.column("tokens_per_second")[-_RECENT:] if "tokens_per_second" in steps.columns else np.empty(0)
    rates = rates[np.isfinite(rates)]
    return {
        "step": index.last_step,
        "total_steps": run.total_steps,
        "began": run.began,
        "last_event": _last_time(index),
        "tokens_per_second": float(rates.mean()) if len(rates) else None,
        "has_model": run.has_model,
    }


def _last_time(index: EventIndex) -> float | None:
    times = [float(table.column(TIME)[-1]) for table in index.tables.values() if table.num_rows]
    times += [float(each["timing"].get("time") or 0.0) for each in index.notable[-1:]]
    return max((each for each in times if each == each), default=None)


def _speed(index: EventIndex, total: int | None) -> dict[str, Any]:
    """Seconds per step of the last steps, of this session, with what came between them; and what is left of the run."""
    table = index.tables["step"]
    resumed = max((each["step"] or 0 for each in index.notable if each["event"] == "session"), default=0)
    steps, times = table.column(STEP)[-_RECENT:], table.column(TIME)[-_RECENT:]
    of_session = np.isfinite(times) & (steps > resumed)
    steps, times = steps[of_session], times[of_session]
    if len(steps) < 2 or steps[-1] <= steps[0]:
        return {}
    seconds = float((times[-1] - times[0]) / (steps[-1] - steps[0]))
    left = None if total is None else max(0.0, (total - float(steps[-1])) * seconds)
    return {"seconds_per_step": seconds, "eta_seconds": left}


def _process(lock: LockState | None) -> dict[str, Any]:
    """Of a run that a process writes: its host, and its memory if that is this machine."""
    if lock is None or not lock.is_active:
        return {}
    found: dict[str, Any] = {"host": lock.holder.host, "is_local": lock.holder.host == os.uname().nodename}
    if found["is_local"] and lock.holder.pid:
        try:
            found["memory"] = psutil.Process(lock.holder.pid).memory_info().rss
        except psutil.Error:
            # It ended meanwhile.
            return found
    return found


def _headline(run: RunFolder) -> dict[str, Any] | None:
    """The metric that judges the run, of its best or last validation."""
    metrics = run.exported_metrics or run.last_metrics
    name = run.outcome.metric if run.outcome.metric in metrics else next((n for n in _HEADLINES if n in metrics), None)
    return None if name is None else {"name": name, "value": metrics[name], "before": run.first_metrics.get(name)}


def _notes_file(run: BoardRun, root: Path) -> Path:
    if run.folder == root:
        raise UserError(f"notes are stored beside the run's folder; open the folder above: loopos ui {root.parent}")
    return run.folder.with_name(f"{run.folder.name}.board.json")


def read_note(run: BoardRun, root: Path) -> dict[str, Any]:
    """`note` and `tags` of a run; empty without, or where the file holds something else."""
    found: Mapping[str, Any] = {}
    if run.folder != root and inside(root, _notes_file(run, root)):
        try:
            found = read_object(_notes_file(run, root))
        except UserError:
            found = {}
    note, tags = found.get("note", ""), found.get("tags", [])
    listed = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    return {"note": note if isinstance(note, str) else "", "tags": listed[:MOST_TAGS]}
