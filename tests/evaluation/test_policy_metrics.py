"""Figures of responses, values and wins: by hand, by enumeration, and SciPy's and scikit-learn's for random input."""

from __future__ import annotations

import math
from itertools import combinations

import numpy
import pytest
import scipy.stats
import sklearn.metrics

from loopos.evaluation.policy_metrics import (
    WinRate,
    best_of_n_expected,
    best_of_n_kl,
    distinct_n,
    eos_rate,
    explained_variance,
    length_mean,
    repetition,
    wilson_interval,
    win_rate,
)


def test_distinct_n_grams_by_hand() -> None:
    responses = [[1, 2, 1, 2], [1, 2], [7]]
    # Bigrams: 12 21 12, and 12; none crosses from one response into the next.
    assert distinct_n(responses, 2) == 2 / 4
    assert distinct_n(responses, 1) == 3 / 7
    assert distinct_n(responses, 4) == 1.0
    assert distinct_n(responses, 5) is None


def test_repetition_by_hand() -> None:
    # Three 4-grams, all the same: two occurred before. Another response repeats nothing, a third is too short to.
    assert repetition([[5] * 6]) == pytest.approx(2 / 3)
    assert repetition([[5] * 6, [1, 2, 3, 4, 5], [5, 5]]) == pytest.approx(2 / 9)
    # Bigrams 12 23 31 12 23: the last two occurred before. What another response said does not count.
    assert repetition([[1, 2, 3, 1, 2, 3], [1, 2, 3]], n=2) == pytest.approx((2 / 5 + 0) / 2)


def test_lengths_and_ends_by_hand() -> None:
    responses = [[3, 9], [9, 3, 3, 3], [], [3, 3, 3, 8]]
    assert length_mean(responses) == 10 / 4
    assert eos_rate(responses, {9}) == 1 / 4
    assert eos_rate(responses, {8, 9}) == 2 / 4


@pytest.mark.parametrize(("wins", "games"), [(0, 10), (10, 10), (7, 9), (1, 1), (480, 1000)])
def test_wilsons_interval_equals_scipys(wins: int, games: int) -> None:
    expected = scipy.stats.binomtest(wins, games).proportion_ci(method="wilson")
    assert wilson_interval(wins, games) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilsons_interval_of_half_a_win_solves_his_equation() -> None:
    # At either end the share lies 1.96 standard errors of that end away: (2.5 / 4 − q)² = 1.96² q (1 − q) / 4.
    low, high = wilson_interval(2.5, 4)
    assert 0 < low < 2.5 / 4 < high < 1
    for end in (low, high):
        assert abs(2.5 / 4 - end) / math.sqrt(end * (1 - end) / 4) == pytest.approx(1.959964, abs=1e-6)


def test_win_rate_by_hand() -> None:
    found = win_rate([3, 1, 2, 5], [1, 3, 2, 4])
    low, high = wilson_interval(2.5, 4)
    assert found == WinRate(rate=0.625, low=low, high=high, wins=2, losses=1, ties=1)
    other = win_rate([1, 3, 2, 4], [3, 1, 2, 5])
    assert (other.rate, other.wins, other.losses) == (0.375, 1, 2)
    assert (other.low, other.high) == pytest.approx((1 - high, 1 - low))


def test_explained_variance_by_hand() -> None:
    returns = [1.0, -2.0, 4.0, -3.0]
    assert explained_variance(returns, returns) == 1.0
    # A constant shift costs nothing, a constant explains nothing, the opposite leaves twice the deviation.
    assert explained_variance([value + 10 for value in returns], returns) == pytest.approx(1.0)
    assert explained_variance([7.0] * 4, returns) == pytest.approx(0.0)
    assert explained_variance([-value for value in returns], returns) == pytest.approx(1 - 4)
    assert explained_variance([1.0, 2.0], [5.0, 5.0]) is None


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_explained_variance_equals_scikit_learn_at_any_scale(scale: float) -> None:
    values, returns = numpy.random.default_rng(0).normal(size=(2, 50))
    expected = sklearn.metrics.explained_variance_score(returns, values)
    assert explained_variance(values * scale, returns * scale) == pytest.approx(expected)


def test_kl_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    for n in (2, 4, 16):
        # K equally likely responses: the i-th best of all is the best of n with chance (i/K)^n − ((i−1)/K)^n.
        for num_responses, nearness in ((10, None), (20_000, 1e-3)):
            chances = numpy.diff((numpy.arange(num_responses + 1) / num_responses) ** n)
            chances = chances[chances > 0]
            exact = float((chances * numpy.log(chances * num_responses)).sum())
            assert exact < best_of_n_kl(n)
            if nearness:
                assert best_of_n_kl(n) == pytest.approx(exact, abs=nearness)


@pytest.mark.parametrize("n", range(1, 7))
def test_the_expected_best_is_the_mean_over_all_draws(n: int) -> None:
    scores = numpy.random.default_rng(n).normal(size=(3, 6)).round(1)
    draws = [max(draw) for row in scores for draw in combinations(row, n)]
    assert best_of_n_expected(scores, n) == pytest.approx(sum(draws) / len(draws))


def test_the_expected_best_of_many_samples_stays_exact() -> None:
    # The best of 200 whole numbers out of 0 … 999 lies at 200 · 1001 / 201 − 1 on average.
    assert best_of_n_expected([range(1000)], 200) == pytest.approx(200 * 1001 / 201 - 1)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no responses"):
        length_mean([])
    with pytest.raises(ValueError, match="no responses"):
        repetition([])
    with pytest.raises(ValueError, match="no responses"):
        eos_rate([], {1})
    with pytest.raises(ValueError, match="n of 0"):
        distinct_n([[1]], 0)
    with pytest.raises(ValueError, match="2 scores for 3"):
        win_rate([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="baseline: 1 of 1 values are nan"):
        win_rate([1], [math.nan])
    with pytest.raises(ValueError, match="2 values for 1 returns"):
        explained_variance([1, 2], [1])
    with pytest.raises(ValueError, match="got 0;"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="got 3 with 2 samples"):
        best_of_n_expected([[1, 2]], 3)
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="at least one trial"):
            wilson_interval(successes, trials)
