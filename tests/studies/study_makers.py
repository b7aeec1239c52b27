"""Small studies, a clock that tests move, and annotators that vote by a rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopos.config.study import StudyConfig
from loopos.studies.events import Assignment
from loopos.studies.items import Item, Response
from loopos.studies.study import Study


class Clock:
    """Seconds since 1970; each call is one later."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def pair(number: int, *, scores: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())) -> Item:
    """A comparison of two sources."""
    responses = tuple(
        Response(content=f"answer {number} of {source}", source=source, scores=own)
        for source, own in zip("AB", scores, strict=True)
    )
    return Item(prompt=f"question {number}", responses=responses)


def study_in(folder: Path, num_items: int = 0, **keys: Any) -> Study:
    """A study of comparisons."""
    config = StudyConfig(title="Which is better?", **{"repeat_fraction": 0.0, **keys})
    study = Study.create(folder, config, Clock())
    study.add([pair(number) for number in range(num_items)])
    return study


Rule = Callable[[Study, Assignment], dict[str, Any]]


def prefers(source: str) -> Rule:
    """Always chooses the response of a source."""

    def ballot(study: Study, assigned: Assignment) -> dict[str, Any]:
        responses = study.items[assigned.item].responses
        return {"choice": "left" if responses[assigned.left].source == source else "right"}

    return ballot


def label_all(study: Study, annotator: str, rule: Rule, most: int = 10_000) -> list[Assignment]:
    """An annotator judges until nothing is left; what was assigned, in order. The key of vote n is ANNOTATOR-n."""
    done: list[Assignment] = []
    while len(done) < most and (assigned := study.next_item(annotator)) is not None:
        study.vote(assigned.key, rule(study, assigned), annotator=annotator, key=f"{annotator}-{len(done)}")
        done.append(assigned)
    return done
