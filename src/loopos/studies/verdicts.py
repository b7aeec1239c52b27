"""Votes on an item → one verdict: which response is better, how probably, and by how much."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loopos.config.study import Mode
from loopos.studies.events import Vote
from loopos.studies.items import Item

_TIE = 0.5


@dataclass(frozen=True, slots=True)
class Judged:
    """An item with the votes on it, in the order of the log, at least one."""

    item: Item
    votes: tuple[Vote, ...]
    mode: Mode

    @property
    def preference(self) -> float:
        """Preference for the first response, from 0 to 1: the mean over votes, neither being ½."""
        return statistics.fmean(vote.preference for vote in self.votes if vote.preference is not None)

    @property
    def better(self) -> int | None:
        """Index of the response that more votes choose; None for a tie."""
        return None if self.preference == _TIE else int(self.preference < _TIE)

    @property
    def probability(self) -> float:
        """Preference for the better response: ½ for a tie."""
        return max(self.preference, 1.0 - self.preference)

    @property
    def margin(self) -> float | None:
        """|mean over votes of ± strength|, ties being 0; None if no vote has a strength."""
        if not any(vote.ballot.strength for vote in self.votes):
            return None
        signed = [2 * ((vote.preference or 0.0) - 0.5) * (vote.ballot.strength or 0) for vote in self.votes]
        return abs(statistics.fmean(signed)) if self.better is not None else 0.0

    @property
    def edited(self) -> str | None:
        """The newest edited text of the better response; in the other modes, of the response."""
        found = [
            vote.ballot.edited
            for vote in self.votes
            if vote.ballot.edited is not None and (self.mode != "compare" or vote.chosen == self.better)
        ]
        return found[-1] if found else None

    @property
    def rating(self) -> float:
        """Mean rating of the response."""
        return statistics.fmean(vote.ballot.rating for vote in self.votes if vote.ballot.rating is not None)


def judged_items(items: Mapping[str, Item], votes: Iterable[Vote], mode: Mode) -> list[Judged]:
    """Items that have votes, in the order of their first vote."""
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.item, []).append(vote)
    return [Judged(items[key], tuple(of_item), mode) for key, of_item in found.items() if key in items]
