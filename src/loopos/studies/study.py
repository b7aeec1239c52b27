"""A study of human feedback: a folder with `study.json`, `items.jsonl` and `votes.jsonl`.

    study = Study.open(folder)
    assignment = study.next_item("ana")
    study.vote(assignment.key, {"choice": "left", "strength": 3}, annotator="ana", key="3f0c...")

Several processes and threads may have the same study open. What `vote`, `skip`, `flag`, `undo` and `edit` return from
is on disk; a second call with the same key returns what the first recorded, and records nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loopos.config.diagnostics import UserError
from loopos.config.load import read_recipe
from loopos.config.registry import choices
from loopos.config.study import StudyConfig
from loopos.storage.durable import explain_disk_full
from loopos.storage.json_files import save_json
from loopos.storage.output_folder import NOTHING_WRITTEN, require_new_folder
from loopos.storage.shared_log import SharedLog
from loopos.studies import strategies
from loopos.studies.events import AnyEvent, Assignment, Ballot, Edit, Flag, Skip, Undo, Vote, check_ballot, mode_of
from loopos.studies.index import INDEX, Index
from loopos.studies.items import Added, Item, Items
from loopos.studies.lines import checked, line_of
from loopos.studies.queue import REQUESTED, Choice, Queue, is_answerable, left_of

CONFIG, VOTES = "study.json", "votes.jsonl"


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event of the log. `is_new`: whether this call recorded it, or an earlier one with the same key."""

    event: AnyEvent
    is_new: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a study. `votes` and `target` are without repeats; `waiting`: items without the responses to judge;
    `torn_bytes`: what was removed from a line that a killed process left incomplete.
    """

    items: int
    waiting: int
    votes: int
    target: int
    repeats: int
    skips: int
    flagged: int
    annotators: int
    torn_bytes: int


class Study:
    """A study in a folder. As a context it closes its files."""

    def __init__(self, folder: Path, config: StudyConfig, clock: Callable[[], float] = time.time) -> None:
        """Use `create` or `open`. clock: the time in seconds since 1970."""
        self.folder, self.config, self._clock = folder, config, clock
        self.items = Items(folder)
        self._log = SharedLog(folder / VOTES)
        self._index = Index(folder / INDEX, self._log, config.lease)
        self._queue = Queue(config, self.items, self._index, strategies.opened(config.strategy))
        self._require_mode()

    @classmethod
    def create(cls, folder: Path, config: StudyConfig, clock: Callable[[], float] = time.time) -> Study:
        """A new study in a new folder. Raises `UserError` if the folder has files."""
        require_new_folder(folder)
        with explain_disk_full(folder, 0, CONFIG, NOTHING_WRITTEN):
            folder.mkdir(parents=True, exist_ok=True)
            save_json(folder / CONFIG, config.model_dump(mode="json"))
        return cls(folder, config, clock)

    @classmethod
    def open(cls, folder: Path, clock: Callable[[], float] = time.time) -> Study:
        """The study in a folder. Raises `UserError` where there is none, and for each line that does not fit."""
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{folder}: got no {CONFIG} there; expected the folder of a study: make one with "
                f"`loopos study new {folder}`"
            )
        return cls(folder, read_recipe(StudyConfig, folder / CONFIG), clock)

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing is buffered."""
        self._index.close()
        self._log.close()
        self.items.close()

    def add(self, items: Sequence[Item]) -> Added:
        """Add items; those that the study has are counted and left out. Raises `StorageError`."""
        return self.items.add(items)

    def next_item(self, annotator: str) -> Assignment | None:
        """What the annotator judges next; the same until it is answered or its lease ends. None if nothing is left for
        the annotator, or the target is reached. Raises `UserError` for a name that may not vote.
        """
        self._require_allowed(annotator)
        with self._log.locked():
            self._index.catch_up()
            now = self._clock()
            current = self._current(annotator, now)
            if current is not None:
                return current
            choice = self._queue.next_for(annotator, now)
            return None if choice is None else self._assign(annotator, choice, now)

    def request(self, annotator: str, item: str) -> Assignment:
        """Assign an item that the annotator requested, such as two answers in a chat. Raises `UserError` for an item
        that cannot be judged.
        """
        self._require_allowed(annotator)
        found = self.items.get(item)
        if found is None or not is_answerable(found, self.config):
            expected = f"an item of {self.folder} with the responses to {self.config.mode}"
            raise UserError(f'item: got "{item}"; expected {expected}')
        with self._log.locked():
            self._index.catch_up()
            left = left_of(self.config, item, annotator)
            return self._assign(annotator, Choice(item, left, False, REQUESTED), self._clock())

    def vote(self, assignment: str, ballot: Mapping[str, Any], *, annotator: str, key: str) -> Recorded:
        """Record a vote on the item of an assignment, also after its lease has ended. Raises `UserError` for a ballot
        that does not fit the study, an assignment of somebody else, and one that is answered by another event.
        """
        found = checked(Ballot, dict(ballot), "ballot")
        check_ballot(found, self.config)

        def event(assigned: Assignment) -> Vote:
            return Vote(
                key=key,
                time=self._clock(),
                annotator=annotator,
                assignment=assigned.key,
                item=assigned.item,
                left=assigned.left,
                is_repeat=assigned.is_repeat,
                ballot=found,
            )

        return self._record(key, lambda: event(self._unanswered(assignment, annotator)))

    def skip(self, assignment: str, *, annotator: str, key: str) -> Recorded:
        """Record that the annotator does not judge the item. Raises `UserError` as `vote`."""

        def event() -> Skip:
            assigned = self._unanswered(assignment, annotator)
            return Skip(key=key, time=self._clock(), annotator=annotator, assignment=assigned.key, item=assigned.item)

        return self._record(key, event)

    def flag(self, item: str, reason: str, *, annotator: str, key: str) -> Recorded:
        """Record that an item should not be used. Raises `UserError` for an unknown item."""
        self._require_allowed(annotator)
        if item not in self.items:
            raise UserError(f'item: got "{item}"; expected the id of an item of {self.folder}')
        values = {"key": key, "time": self._clock(), "annotator": annotator, "item": item, "reason": reason}
        return self._record(key, lambda: checked(Flag, values, "flag"))

    def undo(self, target: str, *, annotator: str, key: str) -> Recorded:
        """Take back the annotator's vote, skip, flag or edit with the key `target`. Raises `UserError` for another
        annotator's, and for one that is taken back.
        """

        def event() -> Undo:
            self._require_own(target, annotator, ("vote", "skip", "flag", "edit"))
            return Undo(key=key, time=self._clock(), annotator=annotator, target=target)

        return self._record(key, event)

    def edit(self, target: str, ballot: Mapping[str, Any], *, annotator: str, key: str) -> Recorded:
        """Replace the ballot of the annotator's vote with the key `target`. Raises `UserError` as `vote` and `undo`."""
        found = checked(Ballot, dict(ballot), "ballot")
        check_ballot(found, self.config)

        def event() -> Edit:
            self._require_own(target, annotator, ("vote",))
            return Edit(key=key, time=self._clock(), annotator=annotator, target=target, ballot=found)

        return self._record(key, event)

    def votes(self, *, repeats: bool = False) -> list[Vote]:
        """The votes in force, as edited, in order; without those on flagged items. repeats: also repeated ones."""
        with self._log.locked():
            self._index.catch_up()
            flagged = self._queue.flagged()
            return [vote for vote in self._index.votes(repeats=repeats) if vote.item not in flagged]

    def random_sample(self) -> list[str]:
        """Ids of the items that are a random sample of all, in random order: estimates use only their votes."""
        with self._log.locked():
            self._index.catch_up()
            return self._queue.random_sample()

    def waiting(self) -> list[Item]:
        """Items without the responses to judge, whose prompt no other item answers: what is to be sampled."""
        items = list(self.items.values())
        answered = {item.prompt_key for item in items if is_answerable(item, self.config)}
        return [item for item in items if not is_answerable(item, self.config) and item.prompt_key not in answered]

    def progress(self) -> Progress:
        """Counts of items and votes."""
        with self._log.locked():
            self._index.catch_up()
            one = self._index.one
            return Progress(
                items=len(self.items),
                waiting=len(self.waiting()),
                votes=self._queue.num_votes(),
                target=self._queue.target(),
                repeats=one("SELECT COUNT(*) FROM votes WHERE is_active AND is_repeat"),
                skips=one("SELECT COUNT(*) FROM events WHERE kind = 'skip' AND is_active"),
                flagged=len(self._queue.flagged()),
                annotators=one("SELECT COUNT(DISTINCT annotator) FROM votes WHERE is_active"),
                torn_bytes=self._log.torn_bytes,
            )

    def index_dump(self) -> dict[str, list[Any]]:
        """The tables of the index, to compare it with one that was made anew."""
        with self._log.locked():
            self._index.catch_up()
            return self._index.dump()

    def _record(self, key: str, event: Callable[[], AnyEvent]) -> Recorded:
        """Append the event, unless one with its key is there."""
        if not key.strip():
            raise UserError("key: got an empty text; expected one that is new for each event, such as a UUID")
        with self._log.locked():
            self._index.catch_up()
            earlier = self._index.event(key)
            if earlier is not None:
                return Recorded(earlier, False)
            new = event()
            self._log.append(line_of(new))
            self._index.catch_up()
            return Recorded(new, True)

    def _assign(self, annotator: str, choice: Choice, now: float) -> Assignment:
        assigned = Assignment(
            key=uuid.uuid4().hex,
            time=now,
            annotator=annotator,
            item=choice.item,
            left=choice.left,
            is_repeat=choice.is_repeat,
            chosen_by=choice.chosen_by,
            expires=now + self.config.lease,
        )
        self._log.append(line_of(assigned))
        self._index.catch_up()
        return assigned

    def _current(self, annotator: str, now: float) -> Assignment | None:
        """The annotator's assignment that is not answered, within its lease; one that an undo brought back first."""
        query = (
            "SELECT key, item, expires FROM assignments WHERE annotator = ? AND answer IS NULL AND expires > ? "
            "ORDER BY expires DESC"
        )
        flagged = self._queue.flagged()
        for key, item, expires in self._index.rows(query, annotator, now):
            event = self._index.event(key)
            if item not in flagged and isinstance(event, Assignment):
                # An undo may have made the lease longer.
                return event.model_copy(update={"expires": expires})
        return None

    def _unanswered(self, key: str, annotator: str) -> Assignment:
        self._require_allowed(annotator)
        event = self._index.event(key)
        if not isinstance(event, Assignment):
            raise UserError(f'assignment: got "{key}"; expected the key of what `next_item` returned')
        if event.annotator != annotator:
            raise UserError(f'annotator: got "{annotator}"; the item was assigned to "{event.annotator}"')
        answer = self._index.one("SELECT answer FROM assignments WHERE key = ?", key)
        if answer is not None:
            raise UserError(f'assignment: got "{key}", which "{answer}" answers; undo or edit that first')
        return event

    def _require_own(self, target: str, annotator: str, kinds: Sequence[str]) -> None:
        found = self._index.rows("SELECT kind, annotator, is_active FROM events WHERE key = ?", target)
        kind, owner, is_active = found[0] if found else ("nothing", annotator, 0)
        if kind not in kinds or owner != annotator:
            expected = f"the key of {choices([f'a {each}' for each in kinds], own='')} by {annotator}".replace('"', "")
            raise UserError(f'target: got "{target}" ({kind} by {owner}); expected {expected}')
        if not is_active:
            raise UserError(f'target: got "{target}", which is taken back already; expected one that is in force')

    def _require_mode(self) -> None:
        """Raises `UserError` if the votes are of another mode than the settings."""
        with self._log.locked():
            votes = self._index.rows("SELECT key, ballot FROM votes WHERE is_active ORDER BY number LIMIT 1")
        for key, text in votes:
            mode = mode_of(Ballot.model_validate_json(text))
            if mode != self.config.mode:
                raise UserError(
                    f'{self.folder / CONFIG}: mode: got "{self.config.mode}"; expected "{mode}", which the vote '
                    f'"{key}" is of; set it back, or make another study'
                )

    def _require_allowed(self, annotator: str) -> None:
        if not annotator.strip():
            raise UserError("annotator: got an empty name; expected one")
        if self.config.annotators is not None and annotator not in self.config.annotators:
            raise UserError(f'annotator: got "{annotator}"; expected {choices(self.config.annotators, own="")}')
