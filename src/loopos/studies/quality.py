"""How good the votes of a study are: agreement, self-consistency, biases, speed, and strengths of the sources.

Figures that describe people (consistency, bias, speed) use all votes. Those that describe the sources (win rate,
ranking) use the random sample of items if a strategy chose the others, because a strategy prefers close pairs.
A figure that is not defined for the votes is None, never nan.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopos.config.diagnostics import UserError
from loopos.evaluation.policy_metrics import wilson_interval
from loopos.studies.agreement import Level, bootstrap_interval, cohen_kappa, fleiss_kappa, krippendorff_alpha
from loopos.studies.events import Vote
from loopos.studies.items import Item
from loopos.studies.queue import RANDOM
from loopos.studies.ranking import BradleyTerry, Game, bradley_terry, elo
from loopos.studies.sequential import SequentialTest, sequential_test
from loopos.studies.study import Study
from loopos.studies.verdicts import judged_items

FAST, SLOW = 1 / 3, 3.0
"""An annotator is fast or slow with a median time below or above this factor of the median of all."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """`count` of `total`, with Wilson's 95% interval."""

    rate: float
    low: float
    high: float
    count: int
    total: int


def proportion(count: int, total: int) -> Proportion | None:
    """The proportion; None if total is 0."""
    return Proportion(count / total, *wilson_interval(count, total), count, total) if total else None


@dataclass(frozen=True, slots=True)
class AnnotatorFigures:
    """One annotator. `consistency`: repeats that got the same answer. `left`: votes for the left response among those
    with a winner; `longer`: votes for the longer one. `seconds`: median time per vote. `pace`: "fast", "slow" or "".
    """

    annotator: str
    votes: int
    consistency: Proportion | None
    left: Proportion | None
    longer: Proportion | None
    seconds: float | None
    pace: str


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures of a study. `consistency`, `left` and `longer` are as in `AnnotatorFigures`, over all annotators;
    `alpha` is Krippendorff's at `level`, with its bootstrap interval; `cohen`: κ of each two annotators; `fleiss` is
    of the items with the same, most frequent number of votes above 1; `reward`: votes with a winner that the mean
    reward of the item's scores agrees with.
    """

    votes: int
    ties: int
    consistency: Proportion | None
    left: Proportion | None
    longer: Proportion | None
    level: Level
    alpha: float | None
    alpha_interval: tuple[float, float] | None
    fleiss: float | None
    cohen: dict[tuple[str, str], float]
    reward: Proportion | None
    seconds: float | None
    annotators: tuple[AnnotatorFigures, ...]


def quality(study: Study) -> Quality:
    """The figures of all votes in force."""
    votes, everything = study.votes(), study.votes(repeats=True)
    level: Level = "interval" if study.config.mode == "rating" else "nominal"
    units = _units(votes)
    median = _median_seconds(votes)
    names = sorted({vote.annotator for vote in everything})
    return Quality(
        votes=len(votes),
        ties=sum(vote.ballot.choice in ("tie", "both_bad") for vote in votes),
        consistency=consistency(everything),
        left=left_votes(everything),
        longer=longer_votes(votes, study.items),
        level=level,
        alpha=krippendorff_alpha(units, level),
        alpha_interval=bootstrap_interval(
            units, lambda drawn: krippendorff_alpha(drawn, level), seed=study.config.seed
        ),
        fleiss=_fleiss(units),
        cohen=_cohen(votes),
        reward=reward_agreement(votes, study.items),
        seconds=median,
        annotators=tuple(_annotator(name, everything, study.items, median) for name in names),
    )


def answer_of(vote: Vote) -> float:
    """A vote as one number, whatever side was left: preference for the first response (−1 for both bad, which is no
    tie), the rating, or 1 and 0 for up and down.
    """
    if vote.ballot.rating is not None:
        return vote.ballot.rating
    if vote.ballot.choice in ("up", "down"):
        return float(vote.ballot.choice == "up")
    if vote.ballot.choice == "both_bad":
        return -1.0
    assert vote.preference is not None, vote
    return vote.preference


def consistency(votes: Sequence[Vote]) -> Proportion | None:
    """Hidden repeats with the same answer as the annotator's first one. votes: with repeats."""
    first = {(vote.annotator, vote.item): answer_of(vote) for vote in votes if not vote.is_repeat}
    pairs = [
        (answer_of(vote), first[vote.annotator, vote.item])
        for vote in votes
        if vote.is_repeat and (vote.annotator, vote.item) in first
    ]
    return proportion(sum(one == other for one, other in pairs), len(pairs))


def left_votes(votes: Sequence[Vote]) -> Proportion | None:
    """Votes for the left response among those with a winner: ½ without bias, as sides are random."""
    sides = [vote.ballot.choice for vote in votes if vote.ballot.choice in ("left", "right")]
    return proportion(sides.count("left"), len(sides))


def longer_votes(votes: Sequence[Vote], items: Mapping[str, Item]) -> Proportion | None:
    """Votes for the longer response (characters) among those with a winner, where the lengths differ."""
    found = []
    for vote in votes:
        if vote.chosen is not None and vote.item in items:
            lengths = [len(response.text) for response in items[vote.item].responses]
            if lengths[0] != lengths[1]:
                found.append(lengths[vote.chosen] == max(lengths))
    return proportion(sum(found), len(found))


def reward_agreement(votes: Sequence[Vote], items: Mapping[str, Item]) -> Proportion | None:
    """Votes for the response with the higher mean reward, among those with a winner on items whose scores differ."""
    found = []
    for vote in votes:
        margins = items[vote.item].margins if vote.item in items else ()
        if vote.chosen is not None and margins and statistics.fmean(margins) != 0:
            found.append((statistics.fmean(margins) > 0) == (vote.chosen == 0))
    return proportion(sum(found), len(found))


def games_of(study: Study) -> list[Game]:
    """Votes on two different sources as games, in order, on the items that estimates may use."""
    games: list[Game] = []
    for vote in _votes_for_estimates(study):
        sources = [response.source for response in study.items[vote.item].responses]
        if vote.preference is not None and len(set(sources)) == 2 and all(sources):
            games.append((sources[0], sources[1], vote.preference))
    return games


@dataclass(frozen=True, slots=True)
class Ranking:
    """`fit`: None with the reason in `problem`. `elo`: by source, in the order of votes."""

    fit: BradleyTerry | None
    problem: str
    elo: dict[str, float]
    games: int


def ranking(study: Study) -> Ranking | None:
    """Strengths of the sources; None if no vote compares two sources."""
    games = games_of(study)
    if not games:
        return None
    try:
        return Ranking(bradley_terry(games), "", elo(games), len(games))
    except UserError as problem:
        return Ranking(None, str(problem), elo(games), len(games))


def win_rate(
    study: Study, first: str, second: str, *, alpha: float = 0.05, indifference: float = 0.0
) -> SequentialTest:
    """How often people prefer source `first` to `second`, as a sequential test.

    A trial is an item with as many votes as the overlap; its outcome is the mean of the first of them, ties half, so
    that several votes on one item are not taken for independent. Raises `UserError` for sources that no item compares.
    """
    sources = {response.source for item in study.items.values() for response in item.responses}
    for name in (first, second):
        if name not in sources:
            raise UserError(f'got the source "{name}"; expected one of {", ".join(sorted(filter(None, sources)))}')
    votes = _votes_for_estimates(study)
    outcomes: list[tuple[float, float]] = []
    for judged in judged_items(study.items, votes, study.config.mode):
        own = _source_index(judged.item, first, second)
        counted = judged.votes[: study.config.overlap]
        if own is not None and len(counted) == study.config.overlap:
            preference = statistics.fmean(vote.preference or 0.0 for vote in counted)
            # An item enters when its last vote comes, which no later vote changes.
            outcomes.append((counted[-1].time, preference if own == 0 else 1.0 - preference))
    ordered = [outcome for _, outcome in sorted(outcomes, key=lambda each: each[0])]
    return sequential_test(ordered, alpha=alpha, indifference=indifference)


def _source_index(item: Item, first: str, second: str) -> int | None:
    """Index of the response of `first` in an item that compares both; None for another item."""
    sources = [response.source for response in item.responses]
    return sources.index(first) if sorted(sources) == sorted((first, second)) and first != second else None


def _votes_for_estimates(study: Study) -> list[Vote]:
    """The votes on the random sample; all votes where every item was chosen at random."""
    votes = study.votes()
    if study.config.strategy == RANDOM:
        return votes
    sample = set(study.random_sample())
    return [vote for vote in votes if vote.item in sample]


def _units(votes: Sequence[Vote]) -> list[list[float]]:
    """The answers to each item."""
    found: dict[str, list[float]] = {}
    for vote in votes:
        found.setdefault(vote.item, []).append(answer_of(vote))
    return list(found.values())


def _fleiss(units: Sequence[Sequence[float]]) -> float | None:
    sizes = [len(unit) for unit in units if len(unit) > 1]
    size = max(set(sizes), key=lambda each: (sizes.count(each), each)) if sizes else 0
    return fleiss_kappa([unit for unit in units if len(unit) == size]) if size else None


def _cohen(votes: Sequence[Vote]) -> dict[tuple[str, str], float]:
    """κ of each two annotators over the items that both judged, where it is defined."""
    answers: dict[str, dict[str, float]] = {}
    for vote in votes:
        answers.setdefault(vote.annotator, {})[vote.item] = answer_of(vote)
    found = {}
    for one, other in itertools.combinations(sorted(answers), 2):
        both = [item for item in answers[one] if item in answers[other]]
        kappa = cohen_kappa([answers[one][item] for item in both], [answers[other][item] for item in both])
        if kappa is not None:
            found[one, other] = kappa
    return found


def _median_seconds(votes: Sequence[Vote]) -> float | None:
    seconds = [vote.ballot.seconds for vote in votes if vote.ballot.seconds is not None]
    return statistics.median(seconds) if seconds else None


def _annotator(name: str, votes: Sequence[Vote], items: Mapping[str, Item], median: float | None) -> AnnotatorFigures:
    own = [vote for vote in votes if vote.annotator == name]
    first = [vote for vote in own if not vote.is_repeat]
    seconds = _median_seconds(own)
    pace = ""
    if seconds is not None and median:
        pace = "fast" if seconds < FAST * median else "slow" if seconds > SLOW * median else ""
    return AnnotatorFigures(
        name, len(first), consistency(own), left_votes(own), longer_votes(first, items), seconds, pace
    )
