"""Which of two answers is better: a reward model, or a user's function that is asked in both orders.

Enters: pairs of answers to one prompt each. Leaves: a `Ruling` a pair, None for one that a reward model has no room
for. Left out: the answers, and what all rulings say together (`winrate`).

How often one model's answers are preferred to another's, prompt by prompt.

Enters: the answers of two models to the same prompts, and a ruling on each pair. Leaves: the rate with its interval, by
what it was decided, and the same among answers of like length; a record a pair. Left out: generating, judging
(`pair_judges`).
Letters: P prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loopos.data.prompts import PromptContent, prompt_text
from loopos.data.record import shown
from loopos.evaluation.own_code import OwnFunction, called_for, number_of, own_function, plain
from loopos.evaluation.policy_metrics import WinRate, wilson_interval
from loopos.evaluation.reward_predictor import RewardPredictor, judged_words

Winner: TypeAlias = Literal["a", "b", "tie"]

PLACES: tuple[str, ...] = ("first", "second", "tie")
"""What a judge function may say."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One prompt and the answers of A and of B. `prompt`: messages, or a text that was continued as it is."""

    prompt: PromptContent
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """`winner`: "tie" where the judge contradicts itself. `orders`: the winner with A's answer first, and with B's
    first; None where answers are scored one by one, so that there is no order. `scores`: of A and of B, None where
    there are none; means over both orders.
    """

    winner: Winner
    orders: tuple[Winner, Winner] | None = None
    scores: tuple[float, float] | None = None


PairJudge: TypeAlias = Callable[[Sequence[Contest]], list[Ruling | None]]


def by_reward(predictor: RewardPredictor) -> PairJudge:
    """The higher score of a reward model wins."""
    as_text = bool(predictor.opened.description["text"])

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        asked = [judged_words(each.prompt, answer, as_text=as_text) for each in contests for answer in (each.a, each.b)]
        scores = [None if found is None else found.score for found in predictor.judge_what_fits(asked)]
        return [
            None if a is None or b is None else Ruling(_higher(a, b, "a", "b"), scores=(a, b))
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        ]

    return judge


def by_function(name: str) -> PairJudge:
    """A user's `function(prompt, first, second)`, all texts, by its name "module:function". It says "first", "second"
    or "tie", or gives two scores. It is asked twice, the second time with the answers in the other order: what wins
    once alone is a tie (Zheng et al. 2023, Judging LLM-as-a-Judge, section 3.4). Raises `UserError` for a function that
    is not there, and for anything else that it says.
    """
    function = own_function(name, "judge")

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        found: list[Ruling | None] = []
        for each in contests:
            asked = prompt_text(each.prompt)
            about = called_for(asked)
            place, scores = _ruling(function, function(asked, each.a, each.b, about=about), about)
            swapped, scores_swapped = _ruling(function, function(asked, each.b, each.a, about=about), about)
            orders = (_winner(place, "a", "b"), _winner(swapped, "b", "a"))
            winner = orders[0] if orders[0] == orders[1] else "tie"
            mean = None
            if scores is not None and scores_swapped is not None:
                mean = ((scores[0] + scores_swapped[1]) / 2, (scores[1] + scores_swapped[0]) / 2)
            found.append(Ruling(winner, orders, mean))
        return found

    return judge


def _ruling(function: OwnFunction, returned: Any, about: str) -> tuple[str, tuple[float, float] | None]:
    """The place of the better answer, and the scores if it gave some. Raises `UserError`."""
    found = plain(returned)
    if isinstance(found, str):
        if found in PLACES:
            return str(found), None
    elif isinstance(found, Sequence):
        scores = [number_of(score) for score in found]
        if len(scores) == 2 and scores[0] is not None and scores[1] is not None:
            return _higher(scores[0], scores[1], "first", "second"), (scores[0], scores[1])
    raise function.error(
        f'returned {shown(returned)}; expected "first", "second", "tie", or two finite numbers\n    for {about}'
    )


def _higher(one: float, other: float, name: str, other_name: str) -> Any:
    return name if one > other else other_name if other > one else "tie"


def _winner(source: str, first: Winner, second: Winner) -> Winner:
    return {"first": first, "second": second}.get(source, "tie")


LIKE_LENGTH = 0.8
"""Answers are of like length where the shorter has at least this share of the longer one's characters."""

_WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `tokens` with the end token; `ended`: by itself, not at the limit of tokens."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers of A and B to prompt number `place`, and which is better. `sample`: which of the prompt's pairs."""

    place: int
    sample: int
    contest: Contest
    a: Reply
    b: Reply
    ruling: Ruling

    @property
    def is_of_like_length(self) -> bool:
        shorter, longer = sorted((len(self.a.text), len(self.b.text)))
        return shorter >= LIKE_LENGTH * longer


def rate_of(pairs: Sequence[Pair]) -> WinRate:
    """A's wins, ties half: the mean over prompts of the mean over their pairs.

    The interval is Wilson's, over prompts: each is one trial, whatever number of pairs it has, since pairs of one
    prompt are not independent of each other (Miller 2024, Adding Error Bars to Evals, section 2.2). Ties and several
    pairs only lower a trial's variance below q (1 − q), so that it is rather too wide than too narrow; and unlike a
    bootstrap's or the normal interval it has a width where one side wins all. Raises ValueError without pairs.
    """
    means = _prompt_means(pairs)
    winners = [pair.ruling.winner for pair in pairs]
    low, high = wilson_interval(math.fsum(means), len(means))
    return WinRate(statistics.fmean(means), low, high, winners.count("a"), winners.count("b"), winners.count("tie"))


def standard_error(pairs: Sequence[Pair]) -> float | None:
    """√(Σ (m_p − m̄)² / (P − 1) / P) of the prompts' mean outcomes m_p; None for a single prompt."""
    means = _prompt_means(pairs)
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Everything by name, as docs/evaluation.md defines it. Raises ValueError without pairs."""
    like = [pair for pair in pairs if pair.is_of_like_length]
    orders = [pair.ruling.orders for pair in pairs if pair.ruling.orders is not None]
    found: dict[str, Any] = {
        "win_rate": _told(pairs),
        "standard_error": standard_error(pairs),
        "like_length": _told(like) if like else None,
        "identical": sum(pair.a.text == pair.b.text for pair in pairs),
        "length": {"a": _lengths([pair.a for pair in pairs]), "b": _lengths([pair.b for pair in pairs])},
    }
    if orders:
        found["both_orders"] = {
            "asked": len(orders),
            "contradictions": sum(one != other for one, other in orders),
            # With A first A won, with B first B: whatever stood first.
            "first_favoured": orders.count(("a", "b")),
            "second_favoured": orders.count(("b", "a")),
        }
    return found


def record(pair: Pair, prompt: str) -> dict[str, Any]:
    """One line of the file of answers."""
    ruling = pair.ruling
    told: dict[str, Any] = {
        "prompt": prompt,
        "sample": pair.sample,
        "a": pair.a.text,
        "b": pair.b.text,
        "tokens": [pair.a.tokens, pair.b.tokens],
        "ended": [pair.a.ended, pair.b.ended],
        "winner": ruling.winner,
    }
    if ruling.orders is not None:
        told["orders"] = list(ruling.orders)
    if ruling.scores is not None:
        told["scores"] = list(ruling.scores)
    return told


def _prompt_means(pairs: Sequence[Pair]) -> list[float]:
    """The mean outcome of each prompt's pairs, `[P]`."""
    outcomes: dict[int, list[float]] = {}
    for pair in pairs:
        outcomes.setdefault(pair.place, []).append(_WORTH[pair.ruling.winner])
    return [statistics.fmean(each) for each in outcomes.values()]


def _told(pairs: Sequence[Pair]) -> dict[str, Any]:
    rate = rate_of(pairs)
    return {
        "rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "wins": rate.wins,
        "losses": rate.losses,
        "ties": rate.ties,
        "prompts": len({pair.place for pair in pairs}),
    }


def _lengths(replies: Sequence[Reply]) -> dict[str, float]:
    return {
        "characters": statistics.fmean(len(reply.text) for reply in replies),
        "tokens": statistics.fmean(reply.tokens for reply in replies),
        "end_rate": statistics.fmean(reply.ended for reply in replies),
    }
