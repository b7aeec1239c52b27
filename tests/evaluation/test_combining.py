"""Combined outputs of members, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch

from loopos.evaluation.combining import Combined, Tally, in_order, tied


def together(method: str, members: list[Any], *, task: str = "classification", weights: Any = None) -> Combined:
    tally = Tally(task, method)
    shares = weights or [1 / len(members)] * len(members)
    for summary, weight in zip(members, shares, strict=True):
        meaning = numpy.array(summary, dtype=numpy.float64)
        logits = (
            torch.tensor([[0.0]])
            if task == "regression"
            else torch.from_numpy(numpy.log(numpy.maximum(meaning, 1e-300)))
        )
        if task == "multi_label":
            logits = torch.from_numpy(numpy.log(meaning / (1 - meaning)))
        tally.add(logits, meaning, weight=weight)
    return tally.result()


def entropy(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities if p)


def test_mean_and_weighted_probability() -> None:
    members = [[[0.8, 0.2]], [[0.4, 0.6]]]
    assert together("mean", members).meaning == pytest.approx(numpy.array([[0.6, 0.4]]))
    assert together("weighted", members, weights=[0.25, 0.75]).meaning == pytest.approx(numpy.array([[0.5, 0.5]]))


def test_mean_logit_is_the_geometric_mean_made_to_sum_to_1() -> None:
    members = [[[0.8, 0.2]], [[0.5, 0.5]]]
    one, other = math.sqrt(0.8 * 0.5), math.sqrt(0.2 * 0.5)
    assert together("logits", members).meaning == pytest.approx(numpy.array([[one, other]]) / (one + other))


def test_mean_logit_of_labels() -> None:
    # Odds of 4 and 1/4 meet at 1.
    assert together("logits", [[[0.8]], [[0.2]]], task="multi_label").meaning == pytest.approx(numpy.array([[0.5]]))


def test_disagreement_by_hand() -> None:
    found = together("mean", [[[1.0, 0.0], [0.7, 0.3]], [[0.0, 1.0], [0.7, 0.3]]]).uncertainty
    # Sure members that contradict each other: all of the entropy is disagreement; members that agree: none of it.
    assert found["entropy"] == pytest.approx([math.log(2), entropy(0.7, 0.3)])
    assert found["mutual_information"] == pytest.approx([math.log(2), 0.0], abs=1e-12)
    assert found["variance"] == pytest.approx([0.25, 0.0], abs=1e-12)


def test_disagreement_counts_the_weights() -> None:
    found = together("weighted", [[[0.9, 0.1]], [[0.5, 0.5]]], weights=[0.75, 0.25]).uncertainty
    mean = 0.75 * 0.9 + 0.25 * 0.5
    assert found["variance"][0] == pytest.approx(0.75 * 0.25 * 0.4**2)
    within = 0.75 * entropy(0.9, 0.1) + 0.25 * entropy(0.5, 0.5)
    assert found["mutual_information"][0] == pytest.approx(entropy(mean, 1 - mean) - within)


def test_disagreement_of_labels_is_summed() -> None:
    found = together("mean", [[[0.9, 0.5]], [[0.1, 0.5]]], task="multi_label").uncertainty
    assert found["entropy"][0] == pytest.approx(2 * math.log(2))
    assert found["mutual_information"][0] == pytest.approx(math.log(2) - entropy(0.9, 0.1))


def test_values_and_their_spread() -> None:
    found = together("mean", [[1e6 + 1.0, 5.0], [1e6 + 3.0, 5.0]], task="regression")
    assert found.meaning == pytest.approx([1e6 + 2.0, 5.0])
    assert found.uncertainty["std"] == pytest.approx([1.0, 0.0], abs=1e-9)
    assert set(found.uncertainty) == {"std"}


def test_a_majority_wins_against_any_mean_probability() -> None:
    found = together("majority", [[[0.51, 0.49]], [[0.51, 0.49]], [[0.0, 1.0]]])
    assert found.votes is not None
    assert found.votes.tolist() == [[2, 1]]
    assert found.meaning == pytest.approx(numpy.array([[2.34 / 4, 1.66 / 4]]))
    assert tied(found.votes, 3, task="classification") == [[]]


def test_a_tie_is_reported_and_goes_to_the_higher_mean() -> None:
    found = together("majority", [[[0.6, 0.4, 0.0]], [[0.1, 0.9, 0.0]]])
    assert found.votes is not None
    assert tied(found.votes, 2, task="classification") == [[0, 1]]
    assert found.meaning.argmax(1).tolist() == [1]
    assert found.meaning.sum() == pytest.approx(1)


def test_a_tie_over_a_label() -> None:
    found = together("majority", [[[0.9, 0.6]], [[0.3, 0.1]]], task="multi_label")
    assert found.votes is not None
    assert found.votes.tolist() == [[1, 1]]
    assert tied(found.votes, 2, task="multi_label") == [[0, 1]]
    assert (found.meaning >= 0.5).tolist() == [[True, False]]


def test_columns_in_order() -> None:
    outputs = torch.tensor([[1.0, 2.0, 3.0]])
    assert in_order(outputs, [2, 0, 1]).tolist() == [[3.0, 1.0, 2.0]]
    assert in_order(outputs, [0, 1, 2]) is outputs
