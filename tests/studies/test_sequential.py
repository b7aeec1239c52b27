"""The sequential test: its bound by hand, its error rate over all looks, and its decisions."""

from __future__ import annotations

import math
import random

import pytest
from scipy.special import betaln

from loopos.studies.sequential import confidence_sequence, sequential_test


def log_mixture(total: float, trials: int, mean: float) -> float:
    value = betaln(0.5 + total, 0.5 + trials - total) - betaln(0.5, 0.5)
    return float(value - total * math.log(mean) - (trials - total) * math.log(1 - mean))


@pytest.mark.parametrize(("total", "trials"), [(7, 10), (3.5, 10), (60, 100), (500, 1000)])
def test_both_ends_are_where_the_mixture_reaches_the_bound(total: float, trials: int) -> None:
    low, high = confidence_sequence(total, trials, 0.05)
    assert low < total / trials < high
    assert log_mixture(total, trials, low) == pytest.approx(math.log(20), abs=1e-6)
    assert log_mixture(total, trials, high) == pytest.approx(math.log(20), abs=1e-6)


def test_the_ends_at_zero_and_one() -> None:
    assert confidence_sequence(0, 0, 0.05) == (0, 1)
    low, high = confidence_sequence(5, 5, 0.05)
    assert high == 1
    assert 0 < low < 0.5
    assert confidence_sequence(0, 5, 0.05) == pytest.approx((0, 1 - low))


def test_wins_in_a_row_decide_by_hand() -> None:
    # M_n(1/2) after n wins is 2^n Γ(n + 1/2) / (√π n!): 20.1 or more first at n = 7 (for 6 it is 14.4).
    mixtures = [2**n * math.gamma(n + 0.5) / (math.sqrt(math.pi) * math.factorial(n)) for n in (6, 7)]
    assert mixtures[0] < 20 < mixtures[1]
    assert sequential_test([1.0] * 6).state == "continue"
    found = sequential_test([1.0] * 7)
    assert (found.state, found.winner, found.decided_after) == ("decided", "a", 7)
    assert sequential_test([0.0] * 9).winner == "b"
    # A decision is not revoked by what comes later.
    later = sequential_test([1.0] * 7 + [0.0] * 3)
    assert (later.winner, later.decided_after, later.trials) == ("a", 7, 10)


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_looking_after_every_vote_errs_less_often_than_alpha(ties: float) -> None:
    """A fixed 95% interval that is looked at as often errs in a third of the studies."""
    draw, errors, naive, studies = random.Random(5), 0, 0, 120
    for _ in range(studies):
        outcomes = [0.5 if draw.random() < ties else float(draw.random() < 0.5) for _ in range(120)]
        errors += sequential_test(outcomes).state == "decided"
        total, crossed = 0.0, False
        for number, outcome in enumerate(outcomes, start=1):
            total += outcome
            error = math.sqrt((1 - ties) * 0.25 / number)
            crossed |= number >= 10 and abs(total / number - 0.5) > 1.96 * error
        naive += crossed
    assert errors / studies <= 0.05
    assert naive / studies >= 0.2


def test_a_difference_is_found_and_equality_too() -> None:
    draw = random.Random(2)
    found = [sequential_test([float(draw.random() < 0.7) for _ in range(200)]) for _ in range(50)]
    assert sum(each.winner == "a" for each in found) >= 48
    assert sum(each.winner == "b" for each in found) == 0
    equal = sequential_test([0.0, 1.0] * 600, indifference=0.1)
    assert equal.winner == "equal"
    assert sequential_test([0.0, 1.0] * 600).state == "continue"


def test_the_bounds_of_all_looks_are_intersected() -> None:
    draw = random.Random(9)
    outcomes = [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(60)]
    bounds = [confidence_sequence(sum(outcomes[:n]), n, 0.05) for n in range(1, 61)]
    found = sequential_test(outcomes)
    assert found.low == pytest.approx(max(low for low, _ in bounds), abs=1e-9)
    assert found.high == pytest.approx(min(high for _, high in bounds), abs=1e-9)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="outcome 2"):
        sequential_test([2])
    with pytest.raises(ValueError, match="alpha 0"):
        sequential_test([1], alpha=0)
    assert sequential_test([]).rate is None
