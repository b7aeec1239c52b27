"""Agreement: numbers worked by hand and published, and the references scikit-learn and krippendorff."""

from __future__ import annotations

import random
from typing import Any

import krippendorff
import numpy
import pytest
from sklearn.metrics import cohen_kappa_score

from loopos.studies.agreement import bootstrap_interval, cohen_kappa, fleiss_kappa, krippendorff_alpha


def test_cohen_by_hand_and_as_scikit_learn() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    draw = random.Random(0)
    for _ in range(20):
        one, other = ([draw.choice("abc") for _ in range(30)] for _ in range(2))
        assert cohen_kappa(one, other) == pytest.approx(cohen_kappa_score(one, other))
    assert cohen_kappa([], []) is None
    assert cohen_kappa("aaa", "aaa") is None
    assert cohen_kappa("ab", "ab") == 1


def test_fleiss_is_that_of_his_table() -> None:
    # Fleiss 1971 as reprinted by Gwet: 10 units, 14 judgments, 5 categories, κ = 0.210.
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    units = [[category for category, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(units) == pytest.approx(0.2099, abs=5e-5)
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([[1, 1], [1, 1]]) is None
    with pytest.raises(ValueError, match=r"units of \[2, 3\] judgments"):
        fleiss_kappa([[1, 2], [1, 2, 2]])


# Krippendorff 2011, section C: four observers, twelve units, missing data.
NONE = numpy.nan
TABLE = numpy.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
])  # fmt: skip


def units_of(table: Any) -> list[list[float]]:
    return [[float(value) for value in column if not numpy.isnan(value)] for column in table.T]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorff_s(level: Any, published: float) -> None:
    assert krippendorff_alpha(units_of(TABLE), level) == pytest.approx(published, abs=5e-4)
    draw = numpy.random.default_rng(1)
    for _ in range(10):
        table = draw.integers(1, 6, (5, 20)).astype(float)
        table[draw.random((5, 20)) < 0.3] = numpy.nan
        expected = krippendorff.alpha(reliability_data=table, level_of_measurement=level)
        assert krippendorff_alpha(units_of(table), level) == pytest.approx(expected)


def test_alpha_without_anything_to_compare_is_none() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[1], [2]]) is None
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1


def test_the_interval_is_seeded_and_holds_the_value() -> None:
    draw = random.Random(3)
    units = [[float(truth), float(truth if draw.random() < 0.8 else 1 - truth)] for truth in [0, 1] * 40]
    value = krippendorff_alpha(units)
    interval = bootstrap_interval(units, krippendorff_alpha, seed=1, draws=300)
    assert interval is not None
    assert value is not None
    assert interval[0] < value < interval[1]
    assert interval[1] - interval[0] < 0.5
    assert interval == bootstrap_interval(units, krippendorff_alpha, seed=1, draws=300)
    assert bootstrap_interval([], krippendorff_alpha, seed=1) is None
    assert bootstrap_interval([[1.0]], krippendorff_alpha, seed=1, draws=10) is None
