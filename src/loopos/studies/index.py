"""An index of `votes.jsonl` in sqlite: what is in force after every undo and edit, and who has which item.

The log is the truth. The index remembers how many bytes of the log it covers and their chained digest; where these do
not match it is deleted and made again from the log, which gives the same tables. Apart from `study`, which writes the
log, because this is the only module that knows sqlite.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

from loopos.storage.shared_log import SharedLog
from loopos.studies.events import AnyEvent, Assignment, Ballot, Edit, Flag, Skip, Undo, Vote, event_of
from loopos.studies.lines import line_of

INDEX = "index.sqlite"
_VERSION = 1
_TABLES = f"""
PRAGMA user_version = {_VERSION};
CREATE TABLE state (size INTEGER NOT NULL, lines INTEGER NOT NULL, digest TEXT NOT NULL);
INSERT INTO state VALUES (0, 0, '');
CREATE TABLE events (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, annotator TEXT NOT NULL, item TEXT,
    target TEXT, is_active INTEGER NOT NULL, body TEXT NOT NULL
);
CREATE INDEX events_by_target ON events (target);
CREATE TABLE assignments (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, item TEXT NOT NULL, annotator TEXT NOT NULL,
    side INTEGER NOT NULL, is_repeat INTEGER NOT NULL, chosen_by TEXT NOT NULL, expires REAL NOT NULL,
    answer TEXT, answered_by TEXT
);
CREATE INDEX assignments_by_annotator ON assignments (annotator);
CREATE TABLE votes (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, item TEXT NOT NULL, annotator TEXT NOT NULL,
    is_repeat INTEGER NOT NULL, is_active INTEGER NOT NULL, ballot TEXT NOT NULL, flag TEXT
);
"""
TABLES = ("state", "events", "assignments", "votes")


class Index:
    """The index of one log. Every call needs the log's lock; `catch_up` comes first."""

    def __init__(self, path: Path, log: SharedLog, lease: float) -> None:
        """lease: time for which an item that comes back by an undo stays with its annotator (s). Raises `DataError`
        for a line of the log that is no event.
        """
        self._path, self._log, self._lease = path, log, lease
        with log.locked():
            self._database, self._pid, self._num_opened = self._connected(), os.getpid(), log.num_opened
            self.catch_up()

    def catch_up(self) -> None:
        """Read what was appended to the log since the last time, by any process."""
        if self._pid != os.getpid():
            # A connection must not be used in a forked child.
            self._database, self._pid = self._connected(), os.getpid()
        size, lines, digest = self._state()
        is_other = self._num_opened != self._log.num_opened and self._digest_of(size) != digest
        self._num_opened = self._log.num_opened
        if self._log.size() < size or is_other:
            # The log was replaced, such as by a copy.
            self._database = self._made_new()
            size, lines, digest = self._state()
        if self._log.size() == size:
            return
        with self._database:
            for line in self._log.read(size).splitlines(keepends=True):
                lines, size, digest = lines + 1, size + len(line), _chained(digest, line)
                if line.strip():
                    self._apply(event_of(line, self._log.path, lines))
            self._database.execute("UPDATE state SET size = ?, lines = ?, digest = ?", (size, lines, digest))

    def one(self, query: str, *values: object) -> Any:
        """The first column of the first row; None without rows."""
        found = self._database.execute(query, values).fetchone()
        return None if found is None else found[0]

    def rows(self, query: str, *values: object) -> list[Any]:
        """All rows."""
        return self._database.execute(query, values).fetchall()

    def event(self, key: str) -> AnyEvent | None:
        """The event with this key."""
        body = self.one("SELECT body FROM events WHERE key = ?", key)
        return None if body is None else event_of(body.encode(), self._log.path, 0)

    def votes(self, *, repeats: bool = False) -> list[Vote]:
        """The votes in force, as edited, in the order of the log. repeats: also those on repeated items."""
        chosen = "" if repeats else "AND NOT votes.is_repeat"
        query = (
            "SELECT events.body, votes.ballot FROM votes JOIN events ON events.key = votes.key "
            f"WHERE votes.is_active {chosen} ORDER BY votes.number"
        )
        return [
            Vote.model_validate_json(json.dumps({**json.loads(body), "ballot": json.loads(ballot)}))
            for body, ballot in self.rows(query)
        ]

    def dump(self) -> dict[str, list[Any]]:
        """Every table, to compare an index with another of the same log."""
        return {name: self.rows(f"SELECT * FROM {name} ORDER BY 1") for name in TABLES}

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _state(self) -> tuple[int, int, str]:
        size, lines, digest = self.rows("SELECT size, lines, digest FROM state")[0]
        return size, lines, digest

    def _connected(self) -> sqlite3.Connection:
        """The database on disk where it belongs to the log, else a new one."""
        if not self._path.exists():
            return self._made_new()
        database = sqlite3.connect(self._path, check_same_thread=False)
        try:
            # The log is flushed; an index that a power cut damages is made again.
            database.execute("PRAGMA synchronous = OFF")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            is_whole = version == _VERSION and database.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            size, digest = database.execute("SELECT size, digest FROM state").fetchone() if is_whole else (0, "")
            if is_whole and self._digest_of(size) == digest:
                return database
        except sqlite3.DatabaseError:
            # Damaged; nothing is lost with it.
            pass
        database.close()
        return self._made_new()

    def _made_new(self) -> sqlite3.Connection:
        with suppress(AttributeError):
            self._database.close()
        for suffix in ("", "-journal"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        database = sqlite3.connect(self._path, check_same_thread=False)
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(f"BEGIN; {_TABLES} COMMIT;")
        return database

    def _digest_of(self, size: int) -> str | None:
        """The chained digest of the first `size` bytes; None if no line ends there."""
        content = self._log.read()
        if size > len(content) or (size > 0 and content[size - 1 : size] != b"\n"):
            return None
        digest = ""
        for line in content[:size].splitlines(keepends=True):
            digest = _chained(digest, line)
        return digest

    def _apply(self, event: AnyEvent) -> None:
        target = getattr(event, "target", None) or getattr(event, "assignment", None)
        row = (event.key, event.kind, event.annotator, getattr(event, "item", None), target, line_of(event).decode())
        new = self._database.execute(
            "INSERT OR IGNORE INTO events (key, kind, annotator, item, target, is_active, body) "
            "VALUES (?, ?, ?, ?, ?, 1, ?)",
            row,
        )
        # The first event with a key counts.
        if new.rowcount:
            self._apply_new(event)

    def _apply_new(self, event: AnyEvent) -> None:
        execute = self._database.execute
        match event:
            case Assignment():
                row: tuple[object, ...] = (event.key, event.item, event.annotator, event.left, event.is_repeat)
                execute(
                    "INSERT INTO assignments (key, item, annotator, side, is_repeat, chosen_by, expires) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, event.chosen_by, event.expires),
                )
            case Vote():
                row = (event.key, event.item, event.annotator, event.is_repeat, _text(event.ballot), event.ballot.flag)
                execute(
                    "INSERT INTO votes (key, item, annotator, is_repeat, is_active, ballot, flag) "
                    "VALUES (?, ?, ?, ?, 1, ?, ?)",
                    row,
                )
                self._answer(event)
            case Skip():
                self._answer(event)
            case Edit():
                self._set_ballot(event.target)
            case Undo():
                self._undo(event)
            case Flag():
                pass

    def _answer(self, event: Vote | Skip) -> None:
        self._database.execute(
            "UPDATE assignments SET answer = ?, answered_by = ? WHERE key = ?",
            (event.key, event.kind, event.assignment),
        )

    def _undo(self, event: Undo) -> None:
        execute = self._database.execute
        found = execute("SELECT kind, target FROM events WHERE key = ?", (event.target,)).fetchone()
        execute("UPDATE events SET is_active = 0 WHERE key = ?", (event.target,))
        kind, above = found or ("", "")
        if kind == "edit":
            self._set_ballot(above)
        elif kind in ("vote", "skip"):
            execute("UPDATE votes SET is_active = 0 WHERE key = ?", (event.target,))
            execute(
                "UPDATE assignments SET answer = NULL, answered_by = NULL, expires = ? WHERE answer = ?",
                (event.time + self._lease, event.target),
            )

    def _set_ballot(self, vote: str) -> None:
        """The ballot of a vote after its edits in force."""
        query = (
            "SELECT body FROM events WHERE key = ? OR (kind = 'edit' AND target = ? AND is_active) "
            "ORDER BY number DESC LIMIT 1"
        )
        body = self.one(query, vote, vote)
        if body is not None:
            ballot = Ballot.model_validate_json(json.dumps(json.loads(body)["ballot"]))
            values = (_text(ballot), ballot.flag, vote)
            self._database.execute("UPDATE votes SET ballot = ?, flag = ? WHERE key = ?", values)


def _chained(digest: str, line: bytes) -> str:
    return hashlib.sha256(digest.encode() + line).hexdigest()


def _text(ballot: Ballot) -> str:
    return line_of(ballot).decode().strip()
