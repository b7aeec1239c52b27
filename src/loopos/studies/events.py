"""What `votes.jsonl` records, one event a line: assignments, votes, skips, flags, undo and edit.

    {"kind": "vote", "key": "3f...", "time": 1790000000.0, "annotator": "ana", "assignment": "a1...", "item": "0c...",
     "left": 1, "ballot": {"choice": "left", "strength": 3, "seconds": 12.5}}

Nothing is ever changed in the log: an undo and an edit are events too. `key` makes an event idempotent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import DataError, Diagnostic, UserError
from loopos.config.keys import Section, Text
from loopos.config.registry import choices
from loopos.config.study import Mode, StudyConfig
from loopos.studies.lines import section_of

Side: TypeAlias = Literal[0, 1]
"""A response of an item by its index."""
Choice: TypeAlias = Literal["left", "right", "tie", "both_bad", "up", "down"]
CHOICES: dict[str, tuple[str, ...]] = {
    "compare": ("left", "right", "tie", "both_bad"),
    "thumbs": ("up", "down"),
    "rating": (),
}
"""What an annotator may choose in each mode."""


class Ballot(Section):
    """What an annotator says about an item."""

    choice: Choice | None = Field(default=None, description="compare and thumbs: the judgment of the whole response")
    rating: float | None = Field(default=None, description="rating: a number on the scale of the study")
    strength: Literal[1, 2, 3, 4] | None = Field(default=None, description="compare: how much better")
    criteria: dict[str, Choice | float] = Field(default={}, description="judgment by criterion")
    comment: str = Field(default="", description="what the annotator remarks")
    edited: Text | None = Field(default=None, description="a better text of the chosen response")
    flag: Text | None = Field(default=None, description="why the item should not be used")
    seconds: float | None = Field(default=None, ge=0, description="time that the annotator took (s)")


class Event(Section):
    """What every event has."""

    key: Text = Field(description="a second event with the same key is not recorded")
    time: float = Field(description="when it was recorded (s since 1970)")
    annotator: Text = Field(description="name of who did it")


class Assignment(Event):
    """An item was given to an annotator, blind: `left` is the index of the response on the left."""

    kind: Literal["assignment"] = "assignment"
    item: Text = Field(description="id of the item")
    left: Side = Field(default=0, description="index of the response that is shown on the left")
    is_repeat: bool = Field(default=False, description="whether the annotator has judged the item before")
    chosen_by: Text = Field(default="random", description="random, or the name of the strategy that chose the item")
    expires: float = Field(description="when the item is free again if it is not answered (s since 1970)")


class Vote(Event):
    """A judgment of the item of an assignment."""

    kind: Literal["vote"] = "vote"
    assignment: Text = Field(description="key of the assignment")
    item: Text = Field(description="id of the item")
    left: Side = Field(default=0, description="index of the response that was shown on the left")
    is_repeat: bool = Field(default=False, description="whether it repeats a vote")
    ballot: Ballot = Field(description="the judgment")

    @property
    def chosen(self) -> int | None:
        """Index of the chosen response; None for a tie, both bad, and the other modes."""
        if self.ballot.choice not in ("left", "right"):
            return None
        return self.left if self.ballot.choice == "left" else 1 - self.left

    @property
    def preference(self) -> float | None:
        """Preference for the first response: 1, 0, or 0.5 where neither is better; None in the other modes."""
        if self.ballot.choice is None or self.ballot.choice in ("up", "down"):
            return None
        return {0: 1.0, 1: 0.0, None: 0.5}[self.chosen]


class Skip(Event):
    """The annotator does not judge the item of an assignment, and does not get it again."""

    kind: Literal["skip"] = "skip"
    assignment: Text = Field(description="key of the assignment")
    item: Text = Field(description="id of the item")


class Flag(Event):
    """The item should not be used; nobody gets it any more."""

    kind: Literal["flag"] = "flag"
    item: Text = Field(description="id of the item")
    reason: Text = Field(description="why")


class Undo(Event):
    """Takes back a vote, skip, flag or edit of the annotator; the item of a vote or skip comes again."""

    kind: Literal["undo"] = "undo"
    target: Text = Field(description="key of the event")


class Edit(Event):
    """Replaces the ballot of a vote of the annotator."""

    kind: Literal["edit"] = "edit"
    target: Text = Field(description="key of the vote")
    ballot: Ballot = Field(description="the new judgment")


AnyEvent: TypeAlias = Assignment | Vote | Skip | Flag | Undo | Edit
KINDS: dict[str, type[AnyEvent]] = {
    "assignment": Assignment,
    "vote": Vote,
    "skip": Skip,
    "flag": Flag,
    "undo": Undo,
    "edit": Edit,
}


def event_of(line: bytes, path: Path, number: int) -> AnyEvent:
    """The event in line `number` of a log. Raises `DataError`."""
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in KINDS:
        actual = "text that is not an event" if values is None else json.dumps(kind)
        hint = "the log was changed after it was written: restore it from a copy, or remove the line"
        raise DataError([Diagnostic(str(path), number, None, "kind", actual, choices(list(KINDS), own=""), hint)])
    return section_of(KINDS[kind], line, path, number)


def mode_of(ballot: Ballot) -> Mode:
    """The mode of the study that a ballot is of."""
    if ballot.rating is not None:
        return "rating"
    return "thumbs" if ballot.choice in CHOICES["thumbs"] else "compare"


def check_ballot(ballot: Ballot, config: StudyConfig) -> None:
    """Raises `UserError` with everything in which a ballot does not fit the study."""
    allowed = CHOICES[config.mode]
    problems = list(_criteria_problems(ballot, config))
    if config.mode == "rating":
        least, most = config.rating_scale
        if ballot.rating is None or not least <= ballot.rating <= most:
            problems.append(("rating", ballot.rating, f"a number from {least} to {most}"))
        if ballot.choice is not None:
            problems.append(("choice", ballot.choice, "nothing: the mode is rating"))
    else:
        if ballot.choice not in allowed:
            problems.append(("choice", ballot.choice, choices(list(allowed), own="")))
        if ballot.rating is not None:
            problems.append(("rating", ballot.rating, f"nothing: the mode is {config.mode}"))
    if ballot.strength is not None and (not config.use_strength or ballot.choice not in ("left", "right")):
        problems.append(("strength", ballot.strength, "nothing, unless one of two responses is better"))
    if ballot.edited is not None and ballot.choice in ("tie", "both_bad"):
        problems.append(("edited", "a text", "nothing, unless one of the responses is chosen"))
    if problems:
        lines = [f"{field}: got {json.dumps(actual)}; expected {expected}" for field, actual, expected in problems]
        raise UserError("\n".join(lines))


def _criteria_problems(ballot: Ballot, config: StudyConfig) -> list[tuple[str, object, str]]:
    found: list[tuple[str, object, str]] = []
    least, most = config.rating_scale
    for name, value in ballot.criteria.items():
        if name not in config.criteria:
            expected = choices(config.criteria, own="") if config.criteria else "none: the study has no criteria"
            found.append(("criteria", name, expected))
        elif config.mode == "rating" and not (isinstance(value, float | int) and least <= value <= most):
            found.append((f"criteria.{name}", value, f"a number from {least} to {most}"))
        elif config.mode != "rating" and value not in CHOICES[config.mode]:
            found.append((f"criteria.{name}", value, choices(list(CHOICES[config.mode]), own="")))
    return found
