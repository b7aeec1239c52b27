"""Win rates: a judge compares answers of two models to the same prompts; the rate has an interval over prompts.

A judge is a reward model, or a user's function, which is called in both orders. The same is reported among answers of
similar length.
Letters: P prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loopos.config.own_function import OwnFunction, own_function
from loopos.data.prompts import PromptContent, prompt_text
from loopos.data.record import shown
from loopos.evaluation.own_code import called_for, number_of, plain
from loopos.evaluation.policy_metrics import WinRate, wilson_interval
from loopos.evaluation.reward_predictor import RewardPredictor, judged_content

Winner: TypeAlias = Literal["a", "b", "tie"]

OUTCOMES: tuple[str, ...] = ("first", "second", "tie")
"""What a judge function may return."""


@dataclass(frozen=True, slots=True)
class Contest:
    """One prompt and the answers of A and of B. `prompt`: messages, or a text to continue."""

    prompt: PromptContent
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """`winner`: "tie" if the judge contradicts itself. `orders`: the winner with A's answer first, and with B's first;
    None if answers are scored separately, without an order. `scores`: of A and of B, None without scores; means over
    both orders.
    """

    winner: Winner
    orders: tuple[Winner, Winner] | None = None
    scores: tuple[float, float] | None = None


PairJudge: TypeAlias = Callable[[Sequence[Contest]], list[Ruling | None]]


def by_reward(predictor: RewardPredictor) -> PairJudge:
    """The answer with the higher score of a reward model wins."""
    as_text = bool(predictor.opened.description["text"])

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        pairs = [
            judged_content(each.prompt, answer, as_text=as_text) for each in contests for answer in (each.a, each.b)
        ]
        scores = [None if found is None else found.score for found in predictor.judge_what_fits(pairs)]
        return [
            None if a is None or b is None else Ruling(_higher(a, b, "a", "b"), scores=(a, b))
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        ]

    return judge


def by_function(name: str) -> PairJudge:
    """A user's `function(prompt, first, second)`, all texts, by its name "module:function". It returns "first",
    "second" or "tie", or two scores. It is called twice, the second time with the answers swapped: an answer that wins
    only once is a tie (Zheng et al. 2023, Judging LLM-as-a-Judge, section 3.4). Raises `UserError` for a missing
    function and for any other result.
    """
    function = own_function(name, "judge")

    def judge(contests: Sequence[Contest]) -> list[Ruling | None]:
        found: list[Ruling | None] = []
        for each in contests:
            text = prompt_text(each.prompt)
            about = called_for(text)
            position, scores = _ruling(function, function(text, each.a, each.b, about=about), about)
            swapped, scores_swapped = _ruling(function, function(text, each.b, each.a, about=about), about)
            orders = (_winner(position, "a", "b"), _winner(swapped, "b", "a"))
            winner = orders[0] if orders[0] == orders[1] else "tie"
            mean = None
            if scores is not None and scores_swapped is not None:
                mean = ((scores[0] + scores_swapped[1]) / 2, (scores[1] + scores_swapped[0]) / 2)
            found.append(Ruling(winner, orders, mean))
        return found

    return judge


def _ruling(function: OwnFunction, returned: Any, about: str) -> tuple[str, tuple[float, float] | None]:
    """The position of the better answer, and the scores if the function returned some. Raises `UserError`."""
    found = plain(returned)
    if isinstance(found, str):
        if found in OUTCOMES:
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
"""Answers are of similar length if the shorter has at least this fraction of the longer one's characters."""

_WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `tokens` includes the end token; `ended`: by itself, not at the token limit."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers of A and B to prompt `prompt_index`, and which is better. `sample`: number of the pair for this
    prompt.
    """

    prompt_index: int
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

    The interval is Wilson's, over prompts: each is one trial, whatever its number of pairs, because pairs of one prompt
    are not independent (Miller 2024, Adding Error Bars to Evals, section 2.2). Ties and several pairs only lower a
    trial's variance below q (1 − q), so the interval is conservative; and unlike a bootstrap or normal interval it has
    a width when one side wins all. Raises ValueError without pairs.
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
    """All figures by name, as docs/evaluation.md defines them. Raises ValueError without pairs."""
    like = [pair for pair in pairs if pair.is_of_like_length]
    orders = [pair.ruling.orders for pair in pairs if pair.ruling.orders is not None]
    found: dict[str, Any] = {
        "win_rate": _rate_figures(pairs),
        "standard_error": standard_error(pairs),
        "like_length": _rate_figures(like) if like else None,
        "identical": sum(pair.a.text == pair.b.text for pair in pairs),
        "length": {"a": _lengths([pair.a for pair in pairs]), "b": _lengths([pair.b for pair in pairs])},
    }
    if orders:
        found["both_orders"] = {
            "asked": len(orders),
            "contradictions": sum(one != other for one, other in orders),
            # A won when first, and B won when first: whichever came first.
            "first_favoured": orders.count(("a", "b")),
            "second_favoured": orders.count(("b", "a")),
        }
    return found


def record(pair: Pair, prompt: str) -> dict[str, Any]:
    """One line of the file of pairs."""
    ruling = pair.ruling
    line: dict[str, Any] = {
        "prompt": prompt,
        "sample": pair.sample,
        "a": pair.a.text,
        "b": pair.b.text,
        "tokens": [pair.a.tokens, pair.b.tokens],
        "ended": [pair.a.ended, pair.b.ended],
        "winner": ruling.winner,
    }
    if ruling.orders is not None:
        line["orders"] = list(ruling.orders)
    if ruling.scores is not None:
        line["scores"] = list(ruling.scores)
    return line


def _prompt_means(pairs: Sequence[Pair]) -> list[float]:
    """The mean outcome of each prompt's pairs, `[P]`."""
    outcomes: dict[int, list[float]] = {}
    for pair in pairs:
        outcomes.setdefault(pair.prompt_index, []).append(_WORTH[pair.ruling.winner])
    return [statistics.fmean(each) for each in outcomes.values()]


def _rate_figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    rate = rate_of(pairs)
    return {
        "rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "wins": rate.wins,
        "losses": rate.losses,
        "ties": rate.ties,
        "prompts": len({pair.prompt_index for pair in pairs}),
    }


def _lengths(replies: Sequence[Reply]) -> dict[str, float]:
    return {
        "characters": statistics.fmean(len(reply.text) for reply in replies),
        "tokens": statistics.fmean(reply.tokens for reply in replies),
        "end_rate": statistics.fmean(reply.ended for reply in replies),
    }
