"""A win rate by people that may be looked at after every vote: a confidence sequence, and a decision.

A fixed-sample interval that is checked again and again errs far more often than its level. Here the level holds for all
looks together, so that a study may stop at the first decision.

Each trial gives x in [0, 1]: 1 if A wins, 0 if B wins, ½ for a tie; μ is its mean. With S = Σ x over n trials,

    M_n(μ) = B(a + S, b + n − S) / (B(a, b) μ^S (1 − μ)^(n − S)),   a = b = ½

is the mixture over q ~ Beta(a, b) of Π (q/μ)^x ((1−q)/(1−μ))^(1−x). Each factor has mean at most 1 by the weighted
inequality of means, also for x between 0 and 1, so M_n is a nonnegative supermartingale with mean at most 1, and by
Ville's inequality P(M_n(μ) ≥ 1/α for any n) ≤ α. The sequence {μ: M_n(μ) < 1/α} holds the true mean at all n at once
with probability 1 − α (Robbins 1970; Howard, Ramdas, McAuliffe, Sekhon 2021, section 3.2; Ville 1939).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_PRIOR = 0.5
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class SequentialTest:
    """`rate`: A's wins, ties half, with the confidence sequence from `low` to `high` of level 1 − alpha. `state`:
    "decided" as soon as it excludes ½, or lies within `indifference` of ½; `winner`: "a", "b", or "equal".
    `decided_after`: trials until the decision, which later trials do not revoke.
    """

    state: Literal["continue", "decided"]
    winner: Literal["a", "b", "equal"] | None
    rate: float | None
    low: float
    high: float
    trials: int
    decided_after: int | None
    alpha: float


def confidence_sequence(total: float, trials: int, alpha: float) -> tuple[float, float]:
    """{μ: M_n(μ) < 1/α} for S = `total` of n = `trials`; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, bound = total / trials, _bound(total, trials, alpha)
    # log M_n is convex in μ with its least at S / n.
    return _edge(total, trials, bound, 0.0, rate), _edge(total, trials, bound, 1.0, rate)


def sequential_test(outcomes: Sequence[float], *, alpha: float = 0.05, indifference: float = 0.0) -> SequentialTest:
    """Test μ = ½ on outcomes in their order, each from 0 to 1 for A.

    The error rate is at most alpha however often it is called while outcomes come in: the bounds of all n are
    intersected, as they hold together. indifference: half-width around ½ within which the two count as equal; 0 for
    never. Raises ValueError for an alpha or outcome out of range.
    """
    if not 0 < alpha < 1 or not 0 <= indifference < 0.5:
        raise ValueError(f"got alpha {alpha} and indifference {indifference}; expected (0, 1) and [0, 0.5)")
    total, low, high = 0.0, 0.0, 1.0
    decided: tuple[Literal["a", "b", "equal"], int] | None = None
    for trials, outcome in enumerate(outcomes, start=1):
        if not 0 <= outcome <= 1:
            raise ValueError(f"got the outcome {outcome}; expected 0 to 1")
        total += outcome
        bound, rate = _bound(total, trials, alpha), total / trials
        # An end moves only if this n excludes it.
        if low < rate and _exceeds(low, total, trials, bound):
            low = _edge(total, trials, bound, low, rate)
        if high > rate and _exceeds(high, total, trials, bound):
            high = _edge(total, trials, bound, high, rate)
        if decided is None and (winner := _winner(low, high, indifference)) is not None:
            decided = winner, trials
    trials = len(outcomes)
    return SequentialTest(
        state="continue" if decided is None else "decided",
        winner=None if decided is None else decided[0],
        rate=total / trials if trials else None,
        low=low,
        high=max(low, high),
        trials=trials,
        decided_after=None if decided is None else decided[1],
        alpha=alpha,
    )


def _winner(low: float, high: float, indifference: float) -> Literal["a", "b", "equal"] | None:
    if low > 0.5:
        return "a"
    if high < 0.5:
        return "b"
    return "equal" if indifference > 0 and high - 0.5 <= indifference and 0.5 - low <= indifference else None


def _edge(total: float, trials: int, bound: float, outer: float, inner: float) -> float:
    """The μ between `outer` and `inner` at which −S log μ − (n − S) log(1 − μ) reaches the bound."""
    if not _exceeds(outer, total, trials, bound):
        return outer
    for _ in range(_BISECTIONS):
        middle = (outer + inner) / 2
        if _exceeds(middle, total, trials, bound):
            outer = middle
        else:
            inner = middle
    return outer


def _exceeds(mean: float, total: float, trials: int, bound: float) -> bool:
    parts = ((total, mean), (trials - total, 1.0 - mean))
    if any(count > 0 and chance <= 0 for count, chance in parts):
        return True
    return -sum(count * math.log(chance) for count, chance in parts if count > 0) >= bound


def _bound(total: float, trials: int, alpha: float) -> float:
    """What −S log μ − (n − S) log(1 − μ) reaches where M_n(μ) = 1/α."""
    mixture = _log_beta(_PRIOR + total, _PRIOR + trials - total) - _log_beta(_PRIOR, _PRIOR)
    return math.log(1.0 / alpha) - mixture


def _log_beta(one: float, other: float) -> float:
    return math.lgamma(one) + math.lgamma(other) - math.lgamma(one + other)
