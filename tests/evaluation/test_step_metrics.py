"""Metrics of step labels, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from loopos.evaluation.step_metrics import first_error, step_metrics
from loopos.functional.preference_loss import step_loss


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_metrics_by_hand() -> None:
    """Right steps at .9, .6 and .2, wrong ones at .3 and .7; a step that was not judged counts nowhere."""
    scores = [[logit(0.9), logit(0.3), logit(0.99)], [logit(0.6), logit(0.7)], [logit(0.2)]]
    labels = [[1.0, 0.0, None], [1.0, 0.0], [1.0]]
    found = step_metrics(scores, labels)
    assert found["num_steps"] == 5
    assert found["right_steps"] == pytest.approx(3 / 5)
    assert found["step_accuracy"] == pytest.approx(3 / 5)
    losses = [-math.log(each) for each in (0.9, 0.7, 0.6, 0.3, 0.2)]
    assert found["loss"] == pytest.approx(sum(losses) / 5)
    # Of the six pairs of a right and a wrong step, .9 is above both, .6 above .3 only, .2 above none.
    assert found["step_auroc"] == pytest.approx(3 / 6)
    # Found in the first answer; not in the second; the third has none, but one is seen.
    assert found["first_error_accuracy"] == pytest.approx(1 / 3)
    # With an error: one of two. Without: none of one.
    assert found["first_error_f1"] == 0.0
    better = step_metrics([*scores, [logit(0.8)]], [*labels, [1.0]])
    assert better["first_error_f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))


def test_soft_labels_and_ties() -> None:
    found = step_metrics([[logit(0.8), 0.0]], [[0.75, 0.5]])
    assert found["loss"] == pytest.approx((-0.75 * math.log(0.8) - 0.25 * math.log(0.2) + math.log(2)) / 2)
    assert found["step_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert "step_auroc" not in found
    assert "first_error_accuracy" not in found
    with pytest.raises(ValueError, match="no labeled step"):
        step_metrics([[1.0]], [[None]])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1.0, 0.0, None], 1),
        ([1.0, 1.0], 2),
        ([0.0, None], 0),
        ([1.0, None, 0.0], None),
        ([None, 0.0], None),
        ([1.0, 0.5, 0.0], None),
    ],
)
def test_where_the_labels_tell_the_first_error(labels: list[float | None], expected: int | None) -> None:
    assert first_error(labels) == expected


def test_the_loss_is_that_of_two_classes() -> None:
    """Cross-entropy of the logits (−s/2, s/2), as of a token classifier of two classes."""
    scores = torch.tensor([-3.0, 0.0, 0.4, 50.0, -50.0], dtype=torch.float64).float()
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    logits = torch.stack([-scores / 2, scores / 2], dim=1)
    expected = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
    torch.testing.assert_close(step_loss(scores, labels), expected)
    soft = torch.tensor([0.2, 0.5, 0.9, 1.0, 0.0])
    expected = torch.nn.functional.cross_entropy(logits, torch.stack([1 - soft, soft], dim=1), reduction="none")
    torch.testing.assert_close(step_loss(scores, soft), expected)
