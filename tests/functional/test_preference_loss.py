"""The reward model's loss against numbers worked by hand, its identities, and one pair at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_reference import pair_loss

from loopos.functional.preference_loss import bradley_terry_sum, center_rewards_sum, preferred


def test_bradley_terry_by_hand() -> None:
    # Δ = ln 3, so P̂ = 3/4: −ln(3/4). Δ = −ln 4, so P̂ = 1/5: −ln(1/5). Δ = 0: ln 2.
    better = torch.tensor([math.log(3.0), 0.5, -7.0])
    worse = torch.tensor([0.0, 0.5 + math.log(4.0), -7.0])
    expected = math.log(4 / 3) + math.log(5) + math.log(2)
    assert float(bradley_terry_sum(better, worse)) == pytest.approx(expected, rel=1e-6)


def test_soft_labels_by_hand() -> None:
    # P̂ = 3/4 with p = 3/4: the entropy of (3/4, 1/4). P̂ = 3/4 with p = 0: −ln(1/4).
    scores = torch.tensor([math.log(3.0), math.log(3.0)])
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    found = bradley_terry_sum(scores, torch.zeros(2), probabilities=torch.tensor([0.75, 0.0]))
    assert float(found) == pytest.approx(entropy + math.log(4), rel=1e-6)


def test_margins_and_weights_by_hand() -> None:
    # Δ = 2 − 0 − (2 − ln 3) = ln 3, weight 2; Δ = 1 − 3 − (−2) = 0, weight ½.
    better, worse = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0])
    margins, weights = torch.tensor([2.0 - math.log(3.0), -2.0]), torch.tensor([2.0, 0.5])
    found = bradley_terry_sum(better, worse, margins=margins, weights=weights)
    assert float(found) == pytest.approx(2 * math.log(4 / 3) + 0.5 * math.log(2), rel=1e-6)
    # With p = 0 the margin still makes the gap: −ln(1 − 3/4) = ln 4.
    none_better = bradley_terry_sum(
        better, worse, probabilities=torch.zeros(2), margins=margins, weights=torch.tensor([1.0, 0.0])
    )
    assert float(none_better) == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs_equal_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = 1 + seed % 6
    better, worse, margins = (2.0 * torch.randn(pairs, generator=generator) for _ in range(3))
    probabilities, weights = torch.rand(pairs, generator=generator), 3.0 * torch.rand(pairs, generator=generator)
    found = bradley_terry_sum(better, worse, probabilities=probabilities, margins=margins, weights=weights)
    expected = sum(
        float(weights[i])
        * pair_loss(float(better[i]), float(worse[i]), probability=float(probabilities[i]), margin=float(margins[i]))
        for i in range(pairs)
    )
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    plain = sum(pair_loss(float(better[i]), float(worse[i])) for i in range(pairs))
    assert float(bradley_terry_sum(better, worse)) == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_a_pair_swapped_with_its_probability_costs_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    better, worse = torch.randn(2, 50, generator=generator)
    probabilities = torch.rand(50, generator=generator)
    one = bradley_terry_sum(better, worse, probabilities=probabilities)
    other = bradley_terry_sum(worse, better, probabilities=1.0 - probabilities)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    # Without soft labels the order matters.
    assert float(bradley_terry_sum(better, worse)) != pytest.approx(float(bradley_terry_sum(worse, better)), rel=1e-3)


def test_only_the_gap_of_a_pair_counts() -> None:
    better, worse = torch.tensor([0.25, -1.5]), torch.tensor([1.0, -2.0])
    moved = bradley_terry_sum(better + 64.0, worse + 64.0)
    assert float(moved) == pytest.approx(float(bradley_terry_sum(better, worse)), rel=1e-6)


def test_an_even_preference_is_cheapest_at_equal_scores() -> None:
    half = torch.tensor([0.5])
    least = float(bradley_terry_sum(torch.tensor([1.25]), torch.tensor([1.25]), probabilities=half))
    assert least == pytest.approx(math.log(2), rel=1e-6)
    costs = {
        gap: float(bradley_terry_sum(torch.tensor([gap]), torch.zeros(1), probabilities=half))
        for gap in (-3.0, -0.1, 0.1, 3.0)
    }
    assert all(cost > least for cost in costs.values()), costs
    assert costs[-3.0] == pytest.approx(costs[3.0], rel=1e-6)


@pytest.mark.parametrize("with_options", [False, True])
def test_the_gradient_is_the_predicted_less_the_expected_probability(with_options: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    better, worse = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
    better.requires_grad_()
    worse.requires_grad_()
    probabilities, margins, weights = torch.ones(40), torch.zeros(40), torch.ones(40)
    loss = bradley_terry_sum(better, worse)
    if with_options:
        probabilities, margins, weights = torch.rand(3, 40, generator=generator)
        loss = bradley_terry_sum(better, worse, probabilities=probabilities, margins=margins, weights=weights)
    of_better, of_worse = torch.autograd.grad(loss, (better, worse))
    predicted = 1.0 / (1.0 + torch.exp(-(better - worse - margins).detach().double()))
    expected = (weights.double() * (predicted - probabilities.double())).float()
    torch.testing.assert_close(of_better, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_worse, -expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("gap", "probability", "expected"),
    [(1e4, None, 0.0), (-1e4, None, 1e4), (1e4, 0.25, 7.5e3), (-1e4, 0.25, 2.5e3), (1e4, 0.0, 1e4), (-1e4, 0.0, 0.0)],
)
def test_huge_gaps_stay_finite(gap: float, probability: float | None, expected: float) -> None:
    better = torch.tensor([gap], requires_grad=True)
    probabilities = None if probability is None else torch.tensor([probability])
    loss = bradley_terry_sum(better, torch.zeros(1), probabilities=probabilities)
    (gradient,) = torch.autograd.grad(loss, better)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # σ(±10⁴) is 1 or 0 in fp32.
    target = 1.0 if probability is None else probability
    assert float(gradient) == pytest.approx((1.0 if gap > 0 else 0.0) - target, abs=1e-6)


def test_scores_in_half_precision_are_compared_in_fp32() -> None:
    # 256 − ½ = 255½ has nine digits in base 2, one more than bf16 holds; p = 0 charges the whole gap.
    better, worse = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.bfloat16)
    loss = bradley_terry_sum(better, worse, probabilities=torch.zeros(1))
    assert loss.dtype == torch.float32
    assert float(loss) == 255.5
    # (256 + ½)² = 65792¼, of which fp32 holds every digit.
    assert float(center_rewards_sum(better, worse)) == 65792.25
    assert preferred(better, worse).dtype == torch.float32


def test_centring_by_hand() -> None:
    # (1.5 − 0.5)² = 1, (2 + 1)² = 9, (−3 + 3)² = 0.
    better, worse = torch.tensor([1.5, 2.0, -3.0]), torch.tensor([-0.5, 1.0, 3.0])
    assert float(center_rewards_sum(better, worse)) == pytest.approx(10.0)
    # ½·1 + 2·9 + 5·0.
    assert float(center_rewards_sum(better, worse, weights=torch.tensor([0.5, 2.0, 5.0]))) == pytest.approx(18.5)


def test_centring_pulls_both_scores_alike() -> None:
    better = torch.tensor([1.5, 2.0], requires_grad=True)
    worse = torch.tensor([-0.5, -4.0], requires_grad=True)
    loss = center_rewards_sum(better, worse, weights=torch.tensor([1.0, 0.5]))
    of_better, of_worse = torch.autograd.grad(loss, (better, worse))
    # d/db (b + w)² = 2·(b + w): 2·1, and ½·2·(−2).
    expected = torch.tensor([2.0, -2.0])
    torch.testing.assert_close(of_better, expected)
    torch.testing.assert_close(of_worse, expected)


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 0.0),
        (2.0, 2.0, 0.5),
        (-3.0, -3.5, 1.0),
        (1.0 + 2.0**-20, 1.0, 1.0),
        (1e4, -1e4, 1.0),
    ],
)
def test_preferred_counts_a_tie_as_half(better: float, worse: float, expected: float) -> None:
    found = preferred(torch.tensor([better]), torch.tensor([worse]))
    assert found.tolist() == [expected]


def test_a_certain_pair_in_reverse_order_keeps_its_small_loss() -> None:
    # p = 0, Δ = −12: −log σ(12) = log(1 + e^−12) = 6.1442e-06.
    found = bradley_terry_sum(torch.tensor([0.0]), torch.tensor([12.0]), probabilities=torch.tensor([0.0]))
    assert float(found) == pytest.approx(6.1442e-6, rel=1e-3)
