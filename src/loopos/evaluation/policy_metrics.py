"""Metrics of a policy's responses, value estimates and win rates.

A metric that is not defined for its input is None, never nan.
Letters: R responses, P prompts, M samples of each prompt, N values, n the best of how many.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy
from numpy.typing import ArrayLike

from loopos.evaluation.metrics import finite_floats

Unit = TypeVar("Unit")
# The standard normal's 97.5% quantile: 95% of the mass is between its negative and it.
_NORMAL_QUANTILE = 1.959963984540054


POLICY_METRIC_DIRECTION: Mapping[str, Literal["min", "max"]] = {
    "reward": "max",
    "reward_within_kl": "max",
    "judge": "max",
    "win_rate": "max",
    "reward_win_rate": "max",
}


@dataclass(frozen=True, slots=True)
class WinRate:
    """`rate` = (wins + ties / 2) / all, with its Wilson 95% interval from `low` to `high`."""

    rate: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion: both roots q of (s/t − q)² = z² q (1 − q) / t, s successes of t trials, z =
    1.96 (Wilson 1927). Half successes are allowed. Raises ValueError without trials or with successes outside
    0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"got {successes} successes of {trials} trials; expected at least one trial and at most as many successes"
        )
    fraction, extra = successes / trials, _NORMAL_QUANTILE**2 / trials
    middle = fraction + extra / 2
    reach = math.sqrt(extra * (fraction * (1 - fraction) + extra / 4))
    # Rounding may exceed the bounds by one bit.
    return max(0.0, (middle - reach) / (1 + extra)), min(1.0, (middle + reach) / (1 + extra))


def win_rate(ours: ArrayLike, baseline: ArrayLike) -> WinRate:
    """How often a score in `ours` is above that in `baseline` for the same prompt, both [P], ties half. Raises
    ValueError on empty, non-finite or misshapen input.
    """
    left, right = finite_floats("ours", ours, num_axes=1), finite_floats("baseline", baseline, num_axes=1)
    if left.shape != right.shape:
        raise ValueError(f"got {len(left)} scores for {len(right)} of the baseline; expected one for each")
    wins, losses = int((left > right).sum()), int((left < right).sum())
    ties = len(left) - wins - losses
    won = wins + ties / 2
    low, high = wilson_interval(won, len(left))
    return WinRate(won / len(left), low, high, wins, losses, ties)


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams / all n-grams over all responses [R] (after Li et al. 2016, who divide by all tokens); None if
    no response has n tokens. 1 = no repetition. Raises ValueError without responses or for n below 1.
    """
    found = [gram for response in _some(responses) for gram in n_grams(response, n)]
    return len(set(found)) / len(found) if found else None


def repetition(responses: Sequence[Sequence[int]], n: int = 4) -> float:
    """Fraction of a response's n-grams that occurred in it before, 1 − distinct / all, mean over responses [R]. A
    response of fewer than n tokens counts as 0. Raises ValueError without responses or for n below 1.
    """
    fractions = []
    for response in _some(responses):
        grams = n_grams(response, n)
        fractions.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(fractions) / len(fractions)


def length_mean(responses: Sequence[Sequence[int]]) -> float:
    """Tokens of a response, mean over responses [R]. Raises ValueError without responses."""
    return sum(len(response) for response in _some(responses)) / len(responses)


def eos_rate(responses: Sequence[Sequence[int]], stop_ids: Collection[int]) -> float:
    """Fraction of responses [R] whose last token is one of `stop_ids`; the rest was cut. Raises ValueError without
    responses.
    """
    return sum(len(response) > 0 and response[-1] in stop_ids for response in _some(responses)) / len(responses)


def explained_variance(values: ArrayLike, returns: ArrayLike) -> float | None:
    """1 − Var(returns − values) / Var(returns), both [N]: 1 is a perfect value model, 0 no better than a constant, less
    is worse than one. None for constant returns. Raises ValueError on empty, non-finite or misshapen input.
    """
    guessed, found = finite_floats("values", values, num_axes=1), finite_floats("returns", returns, num_axes=1)
    if guessed.shape != found.shape:
        raise ValueError(f"got {len(guessed)} values for {len(found)} returns; expected one for each")
    if numpy.ptp(found) == 0:
        return None
    # Scaled first, so that squares of very small or large deviations neither vanish nor overflow.
    scale = numpy.ptp(found)
    return float(1.0 - numpy.var((found - guessed) / scale) / numpy.var(found / scale))


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1) / n, nats: the KL of best-of-n sampling from the policy it samples (Stiennon et al. 2020,
    appendix G.3), exact if no response is likely to be drawn twice, else an upper bound (Beirami et al. 2024). Raises
    ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n: got {n}; expected at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_expected(scores: ArrayLike, n: int) -> float:
    """The unbiased expected best score of n samples, from M >= n samples of each prompt, `scores` [P, M].

    Σ_{i=n..M} C(i−1, n−1) / C(M, n) · s_(i), s_(i) the i-th smallest score of a prompt; mean over prompts (Nakano et
    al. 2021, appendix I). Raises ValueError on empty, non-finite or misshapen input and for n outside 1..M.
    """
    ascending = numpy.sort(finite_floats("scores", scores, num_axes=2), axis=1)
    num_samples = ascending.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"n: got {n} with {num_samples} samples per prompt; expected 1 to {num_samples}")
    draws = math.comb(num_samples, n)
    weights = numpy.array([math.comb(below, n - 1) / draws for below in range(num_samples)])
    return float((ascending @ weights).mean())


def _some(responses: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    if not responses:
        raise ValueError("got no responses; expected at least one")
    return responses


def n_grams(response: Sequence[Unit], n: int) -> list[tuple[Unit, ...]]:
    """All runs of n tokens or words, in order. Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"n-grams: got n of {n}; expected at least 1")
    return [tuple(response[start : start + n]) for start in range(len(response) - n + 1)]
