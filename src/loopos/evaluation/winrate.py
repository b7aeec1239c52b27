"""How often one model's answers are preferred to another's, prompt by prompt.

Enters: the answers of two models to the same prompts, and a ruling on each pair. Leaves: the rate with its interval, by
what it was decided, and the same among answers of like length; a record a pair. Left out: generating, judging
(`pair_judges`).
Letters: P prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopos.evaluation.pair_judges import Contest, Ruling
from loopos.evaluation.policy_metrics import WinRate, wilson_interval

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
