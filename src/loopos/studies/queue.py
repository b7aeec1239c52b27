"""Which item an annotator gets next, and the random sample that makes estimates honest.

Every item has a number u in [0, 1) by the study's seed. A random choice takes the least u of the items that nobody has
begun. With T the greatest u that was chosen at random, the items with u ≤ T are a random sample of all items, whichever
way each of them was chosen: an item that the strategy took first belongs to the sample too. (Only the items that were
chosen at random would be no such sample: they are drawn from what the strategy leaves.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loopos.config.own_function import OwnFunction
from loopos.config.study import StudyConfig
from loopos.studies.events import Side
from loopos.studies.index import Index
from loopos.studies.items import Item
from loopos.studies.strategies import best_of

RANDOM, REQUESTED = "random", "requested"
"""What chose an item, beside the names of strategies: chance, or whoever requested it (an answer in a chat)."""
REPEAT_GAP = 5
"""Least number of an annotator's other votes between a vote and its repeat."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The item that comes next, as an assignment has it."""

    item: str
    left: Side
    is_repeat: bool
    chosen_by: str


@lru_cache(maxsize=1 << 17)
def fraction_of(seed: int, *parts: object) -> float:
    """A number in [0, 1) that depends only on the seed and the parts."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def order_of(config: StudyConfig, item: str) -> float:
    """The item's u: its position in the random order of all items."""
    return fraction_of(config.seed, "order", item)


def left_of(config: StudyConfig, item: str, annotator: str) -> Side:
    """Which response the annotator sees on the left at first."""
    return 1 if config.mode == "compare" and fraction_of(config.seed, "left", item, annotator) < 0.5 else 0


def is_answerable(item: Item, config: StudyConfig) -> bool:
    """Whether an item has the responses that the mode judges; else it waits for them."""
    return len(item.responses) == (2 if config.mode == "compare" else 1)


@dataclass(frozen=True)
class Queue:
    """The queue of a study; needs the lock of the log."""

    config: StudyConfig
    items: Mapping[str, Item]
    index: Index
    strategy: OwnFunction

    def next_for(self, annotator: str, now: float) -> Choice | None:
        """The item that the annotator gets next; None if there is none, or the target is reached. now: the time (s)."""
        if self.config.target_votes is not None and self.num_votes() >= self.config.target_votes:
            return None
        repeated = self._repeat_for(annotator)
        if repeated is not None:
            return repeated
        counts = self._counts(now)
        closed = self._closed_for(annotator, now)
        offered = [item for key, item in self.items.items() if is_answerable(item, self.config) and key not in closed]
        begun = [item for item in offered if 0 < counts.get(item.id, 0) < self.config.overlap]
        if begun:
            item = min(begun, key=lambda each: order_of(self.config, each.id))
            return self._first(item, annotator, self._chosen_by(item.id))
        new = [item for item in offered if not counts.get(item.id)]
        return self._new_for(annotator, new, counts) if new else None

    def target(self) -> int:
        """Votes after which the study is complete."""
        if self.config.target_votes is not None:
            return self.config.target_votes
        flagged = self.flagged()
        return self.config.overlap * sum(
            is_answerable(item, self.config) and key not in flagged for key, item in self.items.items()
        )

    def num_votes(self) -> int:
        """Votes in force, without repeats and those on flagged items."""
        flagged = self.flagged()
        votes = self.index.rows("SELECT item FROM votes WHERE is_active AND NOT is_repeat")
        return sum(item not in flagged for (item,) in votes)

    def random_sample(self) -> list[str]:
        """Ids of the items up to T in the random order: a random sample of all items, in that order."""
        chosen = self.index.rows("SELECT DISTINCT item FROM assignments WHERE chosen_by = ?", RANDOM)
        if not chosen:
            return []
        last = max(order_of(self.config, item) for (item,) in chosen)
        return sorted(
            (key for key, item in self.items.items() if is_answerable(item, self.config) and self._order(key) <= last),
            key=self._order,
        )

    def _order(self, item: str) -> float:
        return order_of(self.config, item)

    def _new_for(self, annotator: str, new: Sequence[Item], counts: Mapping[str, int]) -> Choice:
        """An item that nobody has begun: at random or by the strategy, as a number by the seed decides."""
        order = [self._order(item.id) for item in new]
        num_assigned = self.index.one("SELECT COUNT(*) FROM assignments")
        is_random = fraction_of(self.config.seed, "random", num_assigned) < self.config.random_fraction
        if is_random or self.config.strategy == RANDOM:
            return self._first(new[order.index(min(order))], annotator, RANDOM)
        begun = [self.items[key] for key, count in counts.items() if count and key in self.items]
        chosen = new[best_of(self.strategy, new, begun, order)]
        return self._first(chosen, annotator, self.config.strategy)

    def _first(self, item: Item, annotator: str, chosen_by: str) -> Choice:
        return Choice(item.id, left_of(self.config, item.id, annotator), False, chosen_by)

    def _chosen_by(self, item: str) -> str:
        """What chose an item that others have begun."""
        query = "SELECT chosen_by FROM assignments WHERE item = ? AND NOT is_repeat ORDER BY number DESC LIMIT 1"
        return str(self.index.one(query, item))

    def _repeat_for(self, annotator: str) -> Choice | None:
        """A vote of the annotator to repeat with sides swapped, in the fraction of cases that the config sets."""
        config = self.config
        num_assigned = self.index.one("SELECT COUNT(*) FROM assignments WHERE annotator = ?", annotator)
        if fraction_of(config.seed, "repeat", annotator, num_assigned) >= config.repeat_fraction:
            return None
        flagged = self.flagged()
        query = (
            "SELECT item, side FROM assignments WHERE annotator = ? AND answered_by = 'vote' AND NOT is_repeat "
            "ORDER BY number"
        )
        voted = self.index.rows(query, annotator)
        done = {
            item
            for (item,) in self.index.rows("SELECT item FROM assignments WHERE annotator = ? AND is_repeat", annotator)
        }
        eligible = [each for each in voted[: max(0, len(voted) - REPEAT_GAP)] if each[0] not in done | flagged]
        if not eligible:
            return None
        item, side = min(eligible, key=lambda each: fraction_of(config.seed, "repeated", annotator, each[0]))
        left: Side = 0 if config.mode != "compare" or side == 1 else 1
        return Choice(item, left, True, self._chosen_by(item))

    def _counts(self, now: float) -> dict[str, int]:
        """Item → annotators who have judged it or have it now."""
        query = (
            "SELECT item, COUNT(DISTINCT annotator) FROM assignments WHERE NOT is_repeat "
            "AND (answered_by = 'vote' OR (answer IS NULL AND expires > ?)) GROUP BY item ORDER BY MIN(number)"
        )
        return dict(self.index.rows(query, now))

    def _closed_for(self, annotator: str, now: float) -> set[str]:
        """Items that the annotator has answered, and those that are flagged."""
        query = "SELECT DISTINCT item FROM assignments WHERE annotator = ? AND (answer IS NOT NULL OR expires > ?)"
        return {item for (item,) in self.index.rows(query, annotator, now)} | self.flagged()

    def flagged(self) -> set[str]:
        """Ids of the items that somebody flagged: nobody gets them any more."""
        flags = self.index.rows("SELECT item FROM events WHERE kind = 'flag' AND is_active")
        votes = self.index.rows("SELECT item FROM votes WHERE is_active AND flag IS NOT NULL")
        return {item for (item,) in (*flags, *votes)}
