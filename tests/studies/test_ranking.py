"""Bradley–Terry with ties and Elo: worked by hand, against scipy's optimizer, and where there is no estimate."""

from __future__ import annotations

import math
import random

import numpy
import pytest
from scipy.optimize import minimize

from loopos.config.diagnostics import UserError
from loopos.studies.ranking import Game, bradley_terry, elo


def test_two_sources_by_hand() -> None:
    # Without ties P(A beats B) is the fraction 3/4: odds of 3, 400 log10 3 = 190.85 points.
    found = bradley_terry([("A", "B", 1.0)] * 3 + [("A", "B", 0.0)])
    best, other = found.strengths
    assert (best.source, other.source) == ("A", "B")
    assert best.rating - other.rating == pytest.approx(400 * math.log10(3))
    assert best.rating + other.rating == pytest.approx(2000)
    assert found.tie_parameter == 0
    # The standard error of the log odds is √(1/3 + 1), of each θ half of it.
    assert (best.high - best.low) / 2 == pytest.approx(1.959964 * math.sqrt(4 / 3) / 2 * 400 / math.log(10))
    assert found.log_likelihood == pytest.approx(3 * math.log(0.75) + math.log(0.25))
    # With 6 wins, 2 losses and 4 ties each outcome has its fraction: e^(θA−θB) = 3, ν = 4 / √(6 · 2).
    found = bradley_terry([("A", "B", 1.0)] * 6 + [("B", "A", 1.0)] * 2 + [("B", "A", 0.5)] * 4)
    best, other = found.strengths
    assert best.rating - other.rating == pytest.approx(400 * math.log10(3))
    assert found.tie_parameter == pytest.approx(4 / math.sqrt(12))
    assert (best.games, best.wins, best.ties) == (12, 6, 4)


def random_games(seed: int) -> list[Game]:
    draw, strength = random.Random(seed), {"a": 0.0, "b": 0.5, "c": 1.0, "d": 1.2}
    games = []
    for _ in range(300):
        one, other = draw.sample(sorted(strength), 2)
        weights = [
            math.exp(strength[one]),
            math.exp(strength[other]),
            0.6 * math.exp((strength[one] + strength[other]) / 2),
        ]
        games.append((one, other, draw.choices([1.0, 0.0, 0.5], weights)[0]))
    return games


def test_the_maximum_is_scipy_s() -> None:
    games = random_games(0)
    names = sorted({name for one, other, _ in games for name in (one, other)})

    def loss(parameters: numpy.ndarray) -> float:
        total = 0.0
        for one, other, outcome in games:
            i, j = parameters[names.index(one)], parameters[names.index(other)]
            tie = parameters[-1] + (i + j) / 2
            chosen = {1.0: i, 0.0: j, 0.5: tie}[outcome]
            total -= chosen - math.log(math.exp(i) + math.exp(j) + math.exp(tie))
        return total + sum(parameters[:-1]) ** 2

    reference = minimize(loss, numpy.zeros(5))
    found = bradley_terry(games)
    assert found.log_likelihood == pytest.approx(-reference.fun, abs=1e-6)
    thetas = {each.source: (each.rating - 1000) * math.log(10) / 400 for each in found.strengths}
    assert [thetas[name] for name in names] == pytest.approx(list(reference.x[:4]), abs=1e-3)
    assert [each.source for each in found.strengths] == sorted(names, key=lambda name: -thetas[name])
    assert found.tie_parameter == pytest.approx(math.exp(reference.x[4]), abs=1e-3)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 1.2}
    middle = sum(truth.values()) / 4
    inside = [
        each.low <= 1000 + 400 / math.log(10) * (truth[each.source] - middle) <= each.high
        for seed in range(40)
        for each in bradley_terry(random_games(seed)).strengths
    ]
    assert len(inside) == 160
    assert 0.9 <= sum(inside) / 160 <= 0.995


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([], "comparisons of 0 sources"),
        ([("A", "B", 1.0)] * 5, "B never won or tied against A"),
        ([("A", "B", 0.5), ("C", "D", 0.5)], "A, B never won or tied against C, D"),
        ([("A", "A", 1.0), ("A", "B", 0.5)], "a source with itself"),
        ([("A", "B", 1.0)] * 5 + [("A", "B", 0.5)], "no source won against one that it lost to"),
        ([("A", "B", 0.5)] * 5, "no source won against one that it lost to"),
        ([("A", "B", 1.0), ("B", "C", 1.0), ("A", "B", 0.5), ("B", "C", 0.5)], "no source won against"),
    ],
)
def test_without_a_finite_estimate_the_reason_is_named(games: list[Game], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bradley_terry(games)


def test_a_circle_of_wins_or_of_wins_and_a_tie_has_an_estimate() -> None:
    assert bradley_terry([("A", "B", 1.0), ("B", "A", 1.0), ("A", "B", 0.5)]).tie_parameter == pytest.approx(1)
    # A over B over C, and C is as good as A: the tie and the wins hold each other.
    found = bradley_terry([("A", "B", 1.0), ("B", "C", 1.0), ("C", "A", 0.5)])
    assert all(abs(each.rating) < 3000 for each in found.strengths)
    assert [each.source for each in found.strengths] == ["A", "B", "C"]


def test_elo_by_hand() -> None:
    # An expected 1/2 each: the winner takes 16 of 32. Then 1 / (1 + 10^(−32/400)) = 0.5460 is expected of A.
    assert elo([("A", "B", 1.0)]) == {"A": 1016.0, "B": 984.0}
    second = elo([("A", "B", 1.0), ("A", "B", 0.5)])
    assert second["A"] == pytest.approx(1016 + 32 * (0.5 - 1 / (1 + 10 ** (-32 / 400))))
    assert sum(second.values()) == pytest.approx(2000)
