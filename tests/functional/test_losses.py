"""Losses against numbers worked by hand and against torch's own reductions; sums that add up however rows are split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loopos.data.batches import Batch
from loopos.functional import losses
from loopos.functional.packing import PackedLayout
from loopos.functional.reductions import segment_reduce, weighted_mean
from loopos.training.objectives import TaskObjective, balanced_weights


def test_cross_entropy_by_hand() -> None:
    # Probabilities 1/4, 3/4 and 9/10, 1/10.
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(9.0), 0.0]])
    labels = torch.tensor([0, 1])
    plain = math.log(4) + math.log(10)
    assert float(losses.cross_entropy_sum(logits, labels)) == pytest.approx(plain, rel=1e-6)
    assert losses.class_weight_sum(labels, None) == 2.0
    weights = torch.tensor([1.0, 3.0])
    weighted = math.log(4) + 3 * math.log(10)
    assert float(losses.cross_entropy_sum(logits, labels, class_weights=weights)) == pytest.approx(weighted, rel=1e-6)
    assert losses.class_weight_sum(labels, weights) == 4.0


def test_label_smoothing_by_hand() -> None:
    # ε = 0.2 over two classes: 0.9 of the label's own loss and 0.1 of the other's.
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = 0.9 * math.log(4) + 0.1 * math.log(4 / 3)
    found = losses.cross_entropy_sum(logits, torch.tensor([0]), label_smoothing=0.2)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_cross_entropy_equals_torchs_mean_times_its_count(weights: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    weight = None if weights is None else torch.tensor(weights)
    mean = functional.cross_entropy(logits, labels, weight=weight)
    total = losses.cross_entropy_sum(logits, labels, class_weights=weight)
    assert float(total) / losses.class_weight_sum(labels, weight) == pytest.approx(float(mean), rel=1e-6)


def test_smoothing_and_class_weights_together_by_definition() -> None:
    """Each class's part of the smoothed target carries that class's own weight, as torch defines it."""
    logits = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.0])
    surprise = -torch.log_softmax(logits[0], -1)
    # Label 1, ε = 0.3 over three classes.
    expected = 0.7 * 2.0 * surprise[1] + 0.1 * (0.5 * surprise[0] + 2.0 * surprise[1] + 1.0 * surprise[2])
    found = losses.cross_entropy_sum(logits, torch.tensor([1]), class_weights=weights, label_smoothing=0.3)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_binary_cross_entropy_by_hand() -> None:
    # σ(ln 3) = 3/4, σ(0) = 1/2.
    logits, targets = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[1, 0]])
    assert float(losses.binary_cross_entropy_sum(logits, targets)) == pytest.approx(math.log(4 / 3) + math.log(2))


def test_squared_and_huber_errors_by_hand() -> None:
    predictions, targets = torch.tensor([1.0, 5.0, -2.0]), torch.tensor([1.5, 2.0, 0.0])
    # Errors -0.5, 3, -2.
    assert float(losses.squared_error_sum(predictions, targets)) == pytest.approx(0.25 + 9 + 4)
    # δ = 1: ½·0.25, then 1·(3 - ½), 1·(2 - ½).
    assert float(losses.huber_sum(predictions, targets, delta=1.0)) == pytest.approx(0.125 + 2.5 + 1.5)
    # δ = 2.5: ½·0.25, 2.5·(3 - 1.25), ½·4.
    assert float(losses.huber_sum(predictions, targets, delta=2.5)) == pytest.approx(0.125 + 4.375 + 2.0)


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    logits = torch.zeros(4096, 2, dtype=torch.bfloat16)
    total = losses.cross_entropy_sum(logits, torch.zeros(4096, dtype=torch.int64))
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(4096 * math.log(2), rel=1e-6)


def test_balanced_weights_by_hand() -> None:
    # Six rows, three classes with 3, 2 and 1: 6 / (3·3), 6 / (3·2), 6 / (3·1).
    found = balanced_weights(torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1.0, 2.0]))
    # Every class then weighs alike: 3·2/3 = 2·1 = 1·2.
    assert losses.class_weight_sum(torch.tensor([0, 0, 0, 1, 1, 2]), found) == pytest.approx(6.0)
    # A class without rows is no division by zero.
    assert balanced_weights(torch.tensor([0, 0]), 2).tolist() == [0.5, 1.0]


OUTPUTS = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
CASES: dict[str, tuple[TaskObjective, Tensor]] = {
    "weighted classes": (
        TaskObjective(lambda *_: OUTPUTS, "classification", torch.tensor([0.2, 1.0, 5.0])),
        torch.tensor([0, 0, 2, 1, 0, 2, 1, 1, 0]),
    ),
    "several labels": (TaskObjective(lambda *_: OUTPUTS, "multi_label"), (OUTPUTS > 0.3).float()),
    "huber": (
        TaskObjective(lambda *_: OUTPUTS, "regression", regression_loss="huber", huber_delta=0.5),
        torch.linspace(-2, 2, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_add_up_to_the_mean_of_the_step(case: str) -> None:
    objective, targets = CASES[case]
    whole = objective.mean_of(OUTPUTS, targets)
    chunks = [slice(0, 1), slice(1, 7), slice(7, 9)]
    counts = {"loss": sum(objective.count_of(targets[chunk]) for chunk in chunks)}
    shares = [
        weighted_mean({"loss": objective.sum_of(OUTPUTS[chunk], targets[chunk])}, counts, objective.weights)
        for chunk in chunks
    ]
    assert float(torch.stack(shares).sum()) == pytest.approx(whole, rel=1e-6)
    # A mean of the pieces' own means is another number: the rows are split unevenly.
    means = [objective.mean_of(OUTPUTS[chunk], targets[chunk]) for chunk in chunks]
    assert abs(sum(means) / 3 - whole) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_known_without_a_forward_pass(case: str) -> None:
    objective, targets = CASES[case]
    batch = Batch(torch.zeros(9, dtype=torch.int64), PackedLayout((1,) * 9), None, targets, tuple(range(9)))
    expected = {"weighted classes": 4 * 0.2 + 3 * 1.0 + 2 * 5.0, "several labels": 27.0, "huber": 9.0}[case]
    assert objective.counts(batch)["loss"] == pytest.approx(expected)
    assert float(objective.loss(batch)["loss"]) == pytest.approx(float(objective.sum_of(OUTPUTS, targets)))


def test_a_name_without_a_weight_is_reported_only_and_a_count_of_nothing_gives_nothing() -> None:
    sums = {"a": torch.tensor(6.0), "b": torch.tensor(8.0), "c": torch.tensor(100.0)}
    found = weighted_mean(sums, {"a": 3.0, "b": 0.0, "c": 5.0}, {"a": 0.5, "b": 1.0})
    assert float(found) == pytest.approx(0.5 * 6 / 3)


def test_segments_by_hand() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [-4.0]], requires_grad=True)
    lengths = torch.tensor([2, 1, 1])
    assert segment_reduce(values, lengths, "mean").flatten().tolist() == [2.0, 5.0, -4.0]
    assert segment_reduce(values, lengths, "max").flatten().tolist() == [3.0, 5.0, -4.0]
    segment_reduce(values, lengths, "mean").sum().backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.5, 0.5, 1.0, 1.0]
