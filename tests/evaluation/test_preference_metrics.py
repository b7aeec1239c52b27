"""Metrics of pairs: by hand, under exchange of the two responses, and SciPy's and scikit-learn's for random input."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from loopos.evaluation.preference_metrics import (
    PREFERENCE_METRIC_DIRECTION,
    margin_buckets,
    preference_metrics,
    reliability,
)


def logits(*chances: float) -> list[float]:
    return [math.log(chance / (1 - chance)) for chance in chances]


def test_figures_by_hand() -> None:
    # Gaps 1, −1, 0 and 2.
    metrics = preference_metrics([2, 0, 1, -1], [1, 1, 1, -3])
    assert metrics["num_pairs"] == 4
    assert metrics["pair_accuracy"] == 2.5 / 4
    assert metrics["score_gap"] == pytest.approx(0.5)
    losses = [math.log(1 + math.exp(-gap)) for gap in (1, -1, 0, 2)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4)
    # Wilson's equation at both ends: 1.96 standard errors away.
    for end in (metrics["pair_accuracy_low"], metrics["pair_accuracy_high"]):
        assert abs(0.625 - end) / math.sqrt(end * (1 - end) / 4) == pytest.approx(1.959964, abs=1e-6)
    assert metrics["pair_accuracy_low"] < 0.625 < metrics["pair_accuracy_high"]
    assert len(metrics) == 7


def test_calibration_by_hand() -> None:
    # 0.82 right and 0.83 wrong share a bin, 0.91 right is alone, a tie is right by half.
    metrics = preference_metrics(logits(0.82, 1 - 0.83, 0.91, 0.5), [0.0] * 4)
    assert metrics["ece"] == pytest.approx((2 * (0.825 - 0.5) + 0.09 + 0) / 4)
    # The bins are 1/30 wide: 0.81 and 0.85 lie in two, and errors of both signs do not cancel.
    metrics = preference_metrics(logits(0.81, 1 - 0.85), [0.0] * 2)
    assert metrics["ece"] == pytest.approx((0.19 + 0.85) / 2)


def test_probabilities_by_hand() -> None:
    # The third pair is undecided, the fourth's label prefers the response in second place.
    chances = [1.0, 0.75, 0.5, 0.25]
    metrics = preference_metrics([1, -1, 9, 2], [0, 0, 0, 0], probabilities=chances)
    assert metrics["pair_accuracy"] == pytest.approx(1 / 3)
    assert metrics["num_pairs"] == 4
    costs = [-math.log(scipy.special.expit(gap)) * p for gap, p in zip([1, -1, 9, 2], chances, strict=True)]
    costs += [-math.log(scipy.special.expit(-gap)) * (1 - p) for gap, p in zip([1, -1, 9, 2], chances, strict=True)]
    assert metrics["loss"] == pytest.approx(sum(costs) / 4)


def test_a_model_that_predicts_the_labelers_probabilities_is_calibrated_and_its_loss_is_their_entropy() -> None:
    chances = numpy.array([0.55, 0.7, 0.2, 0.93, 0.5])
    metrics = preference_metrics(logits(*chances), [0.0] * 5, probabilities=chances)
    assert metrics["ece"] == pytest.approx(0, abs=1e-12)
    assert metrics["loss"] == pytest.approx(scipy.stats.entropy([chances, 1 - chances]).mean())
    assert metrics["pair_accuracy"] == 1.0


def random_pairs(seed: int) -> dict[str, Any]:
    generator = numpy.random.default_rng(seed)
    scores = generator.normal(size=(2, 80)).round(1)
    return {
        "better": scores[0],
        "worse": scores[1],
        "probabilities": generator.uniform(size=80).round(1),
        "better_lengths": generator.integers(1, 9, 80),
        "worse_lengths": generator.integers(1, 9, 80),
    }


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_a_pair_does_not_matter(seed: int) -> None:
    pairs = random_pairs(seed)
    swapped = {
        "better": pairs["worse"],
        "worse": pairs["better"],
        "probabilities": 1 - pairs["probabilities"],
        "better_lengths": pairs["worse_lengths"],
        "worse_lengths": pairs["better_lengths"],
    }
    assert (pairs["better"] == pairs["worse"]).any()
    there, back = preference_metrics(**pairs), preference_metrics(**swapped)
    assert len(there) == 9
    assert back.pop("score_gap") == pytest.approx(-there.pop("score_gap"))
    assert back == pytest.approx(there)


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_correlations_equal_those_of_scikit_learn_and_scipy(seed: int) -> None:
    pairs = random_pairs(seed) | {"probabilities": None}
    gap = pairs["better"] - pairs["worse"]
    margins = numpy.random.default_rng(seed).normal(size=80) + gap
    metrics = preference_metrics(**pairs, margins=margins)
    expected = sklearn.metrics.log_loss(numpy.ones(80), scipy.special.expit(gap), labels=[0, 1])
    assert metrics["loss"] == pytest.approx(expected)
    scores = numpy.append(pairs["better"], pairs["worse"])
    lengths = numpy.append(pairs["better_lengths"], pairs["worse_lengths"])
    assert metrics["length_correlation"] == pytest.approx(scipy.stats.pearsonr(scores, lengths).statistic)
    assert metrics["margin_correlation"] == pytest.approx(scipy.stats.pearsonr(gap, margins).statistic)


def test_lengths_by_hand() -> None:
    # Longer, shorter, as long: 1.5 of 3; the undecided fourth does not count.
    metrics = preference_metrics(
        [1, 2, 3, 4],
        [0, 0, 0, 0],
        probabilities=[1, 1, 1, 0.5],
        better_lengths=[5, 5, 5, 5],
        worse_lengths=[4, 6, 5, 1],
    )
    assert metrics["longer_wins"] == 0.5


def test_what_is_not_defined_is_absent() -> None:
    undecided = preference_metrics(
        [1, 2], [0, 5], probabilities=[0.5, 0.5], better_lengths=[1, 2], worse_lengths=[3, 4]
    )
    assert sorted(undecided) == ["ece", "length_correlation", "loss", "num_pairs", "score_gap"]
    constant = preference_metrics([1, 2], [0, 5], margins=[1, 1], better_lengths=[3, 3], worse_lengths=[3, 3])
    assert {"length_correlation", "margin_correlation"}.isdisjoint(constant)
    assert constant["longer_wins"] == 0.5


def test_a_certain_error_has_a_finite_loss() -> None:
    metrics = preference_metrics([-1000, 1000], [0, 0])
    assert metrics["loss"] == 500.0
    assert metrics["ece"] == 0.5


def test_every_direction_is_that_of_a_metric() -> None:
    found = preference_metrics([1, 2], [0, 5], margins=[1, 2])
    assert set(PREFERENCE_METRIC_DIRECTION) <= set(found)
    better, worse = (
        preference_metrics([2, 1], [0, 0], margins=[2, 1]),
        preference_metrics([0, 0], [2, 1], margins=[2, 1]),
    )
    for name, direction in PREFERENCE_METRIC_DIRECTION.items():
        assert (better[name] < worse[name]) == (direction == "min"), name


def test_buckets_with_explicit_edges_by_hand() -> None:
    # [1, 2): won. [2, 5): lost, tied. [5, 9]: won twice. Nothing lies below 1.
    buckets = margin_buckets([1, 0, 1, 3, 3], [0, 1, 1, 1, 1], [1, 2, 3, 5, 9], edges=[0.5, 2, 5])
    assert [(bucket.low, bucket.high, bucket.pairs, bucket.accuracy) for bucket in buckets] == [
        (1, 2, 1, 1.0),
        (2, 5, 2, 0.25),
        (5, 9, 2, 1.0),
    ]
    expected = scipy.stats.binomtest(2, 2).proportion_ci(method="wilson")
    assert (buckets[2].accuracy_low, buckets[2].accuracy_high) == pytest.approx((expected.low, expected.high))


def test_buckets_at_quartiles() -> None:
    margins = numpy.random.default_rng(0).permutation(12)
    better = numpy.where(margins >= 6, 1, -1)
    buckets = margin_buckets(better, numpy.zeros(12), margins)
    assert [(bucket.pairs, bucket.accuracy) for bucket in buckets] == [(3, 0.0), (3, 0.0), (3, 1.0), (3, 1.0)]
    assert [bucket.low for bucket in buckets[1:]] == [bucket.high for bucket in buckets[:-1]] == [2.75, 5.5, 8.25]
    assert (buckets[0].low, buckets[-1].high) == (0, 11)
    (only,) = margin_buckets([1, 2], [0, 3], [4, 4])
    assert (only.low, only.high, only.pairs, only.accuracy) == (4, 4, 2, 0.5)


def test_reliability_by_hand() -> None:
    bins = reliability([*logits(0.72, 0.78, 0.35), 0.0], [0.0] * 4)
    found = [(entry.confidence, entry.frequency, entry.pairs) for entry in bins]
    # Both orders: 0.22 and 0.28 never preferred; 0.35 right, 0.65 wrong; the tie twice at 0.5; 0.72 and 0.78 right.
    assert found == [
        (pytest.approx(0.25), 0.0, 2),
        (pytest.approx(0.35), 1.0, 1),
        (0.5, 0.5, 2),
        (pytest.approx(0.65), 0.0, 1),
        (pytest.approx(0.75), 1.0, 2),
    ]


def test_reliability_is_symmetric_and_counts_every_pair_twice() -> None:
    gaps = numpy.random.default_rng(0).normal(size=300)
    chances = numpy.random.default_rng(1).uniform(size=300)
    bins = reliability(gaps, numpy.zeros(300), chances, bins=4)
    assert len(bins) == 4
    assert sum(entry.pairs for entry in bins) == 600
    for entry, mirrored in zip(bins, bins[::-1], strict=True):
        assert entry.pairs == mirrored.pairs
        assert entry.confidence + mirrored.confidence == pytest.approx(1)
        assert entry.frequency + mirrored.frequency == pytest.approx(1)
    sure = reliability([1000.0], [0.0])
    assert [(entry.confidence, entry.frequency, entry.pairs) for entry in sure] == [(0, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize(
    ("actual", "summary"),
    [
        ({"better": [], "worse": []}, "better: got no rows"),
        ({"better": [1, math.inf], "worse": [1, 2]}, "better: 1 of 2 values are nan or inf"),
        ({"better": [1, 2], "worse": [1]}, "worse: got 1 values for 2 pairs"),
        ({"better": [[1]], "worse": [[1]]}, "expected 1 axes"),
        ({"better": [1], "worse": [1], "probabilities": [1.5]}, "expected 0 to 1"),
        ({"better": [1], "worse": [1], "probabilities": [1, 1]}, "probabilities: got 2 values for 1 pairs"),
        ({"better": [1], "worse": [1], "margins": [1, 2]}, "margins: got 2 values for 1 pairs"),
        ({"better": [1], "worse": [1], "better_lengths": [1]}, "lengths: got one side only"),
        ({"better": [1], "worse": [1], "better_lengths": [1], "worse_lengths": [1, 2]}, "worse_lengths: got 2 values"),
    ],
)
def test_bad_input_is_refused(actual: dict[str, Any], summary: str) -> None:
    with pytest.raises(ValueError, match=summary):
        preference_metrics(**actual)


def test_bad_edges_and_bins_are_refused() -> None:
    for edges, summary in (([2, 1], "ascending"), ([1, 1], "ascending"), ([math.nan], "nan or inf"), ([], "no rows")):
        with pytest.raises(ValueError, match=summary):
            margin_buckets([1], [0], [1], edges=edges)
    with pytest.raises(ValueError, match="bins: got 0"):
        reliability([1], [0], bins=0)
