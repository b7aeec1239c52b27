"""Token rewards, advantages, whitening and the KL penalty: by hand, by their identities, and one response at a time."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_reference import (
    kl_estimate,
    mask_of,
    next_coefficient,
    ragged,
    response_advantages,
    response_rewards,
    side_by_side,
    whitened_responses,
)
from torch import Tensor

from loopos.functional.advantages import (
    KL_ESTIMATORS,
    KlController,
    KlEstimator,
    generalized_advantages,
    kl_terms,
    token_rewards,
    truncated_importance,
    whitened,
)

FILLS = [float("nan"), float("inf"), -7.0]


def assert_equals_responses(found: Tensor, responses: list[list[float]], tolerance: float) -> None:
    """The same numbers in the mask, and exactly 0 outside."""
    expected = side_by_side(responses, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not found[~mask_of(responses)].any()


def test_kl_terms_by_hand() -> None:
    # π = 1/2, π_ref = 1/4: d = ln 2. π = 1/4, π_ref = 1/2: d = −ln 2. Equal: 0.
    logprobs = torch.tensor([[0.5, 0.25, 0.125]]).log()
    reference = torch.tensor([[0.25, 0.5, 0.125]]).log()
    two = math.log(2)
    expected = {"k1": [two, -two, 0.0], "k2": [two**2 / 2, two**2 / 2, 0.0], "k3": [0.5 - 1 + two, 2 - 1 - two, 0.0]}
    assert set(KL_ESTIMATORS) == set(expected)
    for estimator in KL_ESTIMATORS:
        found = kl_terms(logprobs, reference, estimator)
        assert found.shape == (1, 3)
        assert found[0].tolist() == pytest.approx(expected[estimator], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("seed", range(5))
def test_random_kl_terms_equal_the_reference(seed: int, estimator: KlEstimator) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = -3.0 * torch.rand(2, 50, generator=generator)
    found = kl_terms(logprobs, reference, estimator)
    expected = [kl_estimate(p, q, estimator) for p, q in zip(logprobs.tolist(), reference.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_k3_is_never_negative_even_next_to_zero() -> None:
    differences = torch.cat([torch.linspace(-5.0, 5.0, 1001), torch.tensor([1e-3, -1e-3, 1e-4, -1e-4, 3e-7, -3e-7])])
    found = kl_terms(differences, torch.zeros_like(differences), "k3")
    assert float(found.min()) >= 0.0
    assert float(found[0]) == pytest.approx(math.exp(5.0) - 1 - 5, rel=1e-6)


def two_policies() -> tuple[Tensor, Tensor, float]:
    """Logits of π with gradient, log π_ref, and KL(π ‖ π_ref) for π = (1, 2, 3, 4)/10, π_ref = (4, 3, 2, 1)/10."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().requires_grad_()
    exact = sum(i / 10 * math.log(i / (5 - i)) for i in range(1, 5))
    return logits, torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), exact


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KlEstimator) -> None:
    logits, reference, exact = two_policies()
    logprobs = logits.detach().log_softmax(0)
    every = kl_terms(logprobs, reference, estimator)
    assert float((logprobs.exp() * every).sum()) == pytest.approx(exact, rel=1e-6)
    tokens = torch.multinomial(logprobs.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    drawn = kl_terms(logprobs[tokens], reference[tokens], estimator).double()
    standard_error = float(drawn.std()) / math.sqrt(20_000)
    assert 0.0 < standard_error < 0.01
    assert abs(float(drawn.mean()) - exact) < 3 * standard_error


def test_expected_gradients_of_the_estimators() -> None:
    """As a loss on drawn tokens, k2 follows the gradient of KL(π ‖ π_ref), k1 nothing, k3 that of KL(π_ref ‖ π)."""
    logits, reference, _ = two_policies()
    logprobs = logits.log_softmax(0)
    policy, target = logprobs.exp(), reference.exp()
    forward = (policy * (logprobs - reference)).sum()
    backward = (target * (reference - logprobs)).sum()
    expected = {
        "k1": torch.zeros(4),
        "k2": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(backward, logits, retain_graph=True)[0],
    }
    assert float((expected["k2"] - expected["k3"]).abs().max()) > 0.05
    for estimator in KL_ESTIMATORS:
        expectation = (policy.detach() * kl_terms(logprobs, reference, estimator)).sum()
        (found,) = torch.autograd.grad(expectation, logits, retain_graph=True)
        torch.testing.assert_close(found, expected[estimator], rtol=1e-6, atol=1e-6)


def test_importance_by_hand() -> None:
    """π/μ of 0.5/0.25, 0.1/0.4 and 0.9/0.1, which is cut at 3."""
    new, behavior = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.4, 0.1]).log()
    torch.testing.assert_close(truncated_importance(new, behavior, cap=3.0), torch.tensor([2.0, 0.25, 3.0]))
    # Over tokens of μ the weights, uncut, have the mean 1.
    torch.testing.assert_close((behavior.exp() * truncated_importance(new, behavior, cap=1e6)).sum(), new.exp().sum())


def test_token_rewards_by_hand() -> None:
    # β = 0.1: −0.05, 0.1, 2 − 0.02; a response of one token is paid both at once: −3 − 0.4.
    kl = torch.tensor([[0.5, -1.0, 0.2], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = token_rewards(torch.tensor([2.0, -3.0]), kl, mask, kl_coefficient=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.1, 1.98], [-3.4, 0.0, 0.0]]))


@pytest.mark.parametrize("seed", range(12))
def test_random_token_rewards_equal_the_reference(seed: int) -> None:
    (kl,) = ragged(seed, 1)
    scores = [0.5 - 1.5 * row for row in range(len(kl))]
    expected = [response_rewards(score, terms, 0.3) for score, terms in zip(scores, kl, strict=True)]
    for fill in FILLS:
        found = token_rewards(
            torch.tensor(scores, dtype=torch.float64), side_by_side(kl, fill), mask_of(kl), kl_coefficient=0.3
        )
        assert_equals_responses(found, expected, 1e-10)


def test_a_responses_rewards_add_up_to_its_score_less_its_whole_divergence() -> None:
    """R(x, y) = r(x, y) − β·log(π(y|x) / π_ref(y|x)), with the probabilities of whole responses."""
    logprobs = torch.tensor([[0.5, 0.5, 0.25], [0.125, 0.5, 1.0]]).log()
    reference = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 1.0]]).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = kl_terms(logprobs, reference, "k1")
    found = token_rewards(torch.tensor([1.0, -2.0]), kl, mask, kl_coefficient=0.5).sum(1)
    # 1/16 against 1/32 and 1/16 against 1/4.
    assert found.tolist() == pytest.approx([1 - 0.5 * math.log(2), -2 + 0.5 * math.log(4)], rel=1e-6)


def test_a_response_without_tokens_gets_no_reward() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(AssertionError, match="without tokens"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), mask, kl_coefficient=0.1)


@pytest.mark.parametrize(
    ("discount", "smoothing", "expected_advantages", "expected_returns"),
    [
        # δ₃ = 1 − 0.6 = 0.4, δ₂ = 0.2 + 0.6 − 0.4 = 0.4, δ₁ = −0.1 + 0.4 − 0.5 = −0.2.
        # A₃ = 0.4, A₂ = 0.4 + 0.95·0.4 = 0.78, A₁ = −0.2 + 0.95·0.78 = 0.541.
        (1.0, 0.95, [0.541, 0.78, 0.4], [1.041, 1.18, 1.0]),
        # δ₃ = 0.4, δ₂ = 0.2 + 0.9·0.6 − 0.4 = 0.34, δ₁ = −0.1 + 0.9·0.4 − 0.5 = −0.24.
        # A₃ = 0.4, A₂ = 0.34 + 0.45·0.4 = 0.52, A₁ = −0.24 + 0.45·0.52 = −0.006.
        (0.9, 0.5, [-0.006, 0.52, 0.4], [0.494, 0.92, 1.0]),
    ],
)
def test_three_tokens_by_hand(
    discount: float, smoothing: float, expected_advantages: list[float], expected_returns: list[float]
) -> None:
    # The second response is one token: A = 1.5 − 0.25. Behind it stands what must not be read.
    rewards = side_by_side([[-0.1, 0.2, 1.0], [1.5]], fill=100.0)
    values = side_by_side([[0.5, 0.4, 0.6], [0.25]], fill=100.0)
    mask = mask_of([[0.0] * 3, [0.0]])
    advantages, returns = generalized_advantages(rewards, values, mask, discount=discount, smoothing=smoothing)
    assert_equals_responses(advantages, [expected_advantages, [1.25]], 1e-10)
    assert_equals_responses(returns, [expected_returns, [1.5]], 1e-10)
    if (discount, smoothing) == (1.0, 0.95):
        torch.testing.assert_close(generalized_advantages(rewards, values, mask)[0], advantages)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("seed", range(24))
def test_random_advantages_equal_the_reference(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    rewards, values = ragged(seed, 2, dtype)
    discount, smoothing = [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)][seed % 4]
    expected: list[list[float]] = []
    expected_returns: list[list[float]] = []
    for paid, value in zip(rewards, values, strict=True):
        expected.append(response_advantages(paid, value, discount=discount, smoothing=smoothing))
        expected_returns.append([one + other for one, other in zip(expected[-1], value, strict=True)])
    for fill in FILLS:
        advantages, returns = generalized_advantages(
            side_by_side(rewards, fill, dtype),
            side_by_side(values, fill, dtype),
            mask_of(rewards),
            discount=discount,
            smoothing=smoothing,
        )
        assert advantages.dtype == returns.dtype == dtype
        assert_equals_responses(advantages, expected, tolerance)
        assert_equals_responses(returns, expected_returns, tolerance)


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize("seed", range(6))
def test_the_two_ends_of_smoothing(seed: int, discount: float) -> None:
    """λ = 1: all that is still to be paid, less the value. λ = 0: the error of one step."""
    rewards, values = ragged(seed, 2)
    whole: list[list[float]] = []
    one_step: list[list[float]] = []
    for paid, value in zip(rewards, values, strict=True):
        indices = range(len(paid))
        whole.append([sum(discount ** (i - t) * paid[i] for i in indices if i >= t) - value[t] for t in indices])
        one_step.append([paid[t] + discount * [*value, 0.0][t + 1] - value[t] for t in indices])
    for smoothing, expected in ((1.0, whole), (0.0, one_step)):
        advantages, returns = generalized_advantages(
            side_by_side(rewards), side_by_side(values), mask_of(rewards), discount=discount, smoothing=smoothing
        )
        assert_equals_responses(advantages, expected, 1e-10)
        torch.testing.assert_close(returns - side_by_side(values), advantages, rtol=1e-10, atol=1e-10)


def test_a_value_that_knows_the_future_leaves_no_advantage() -> None:
    # With γ = ½: 4 + ½·2 + ¼·8 = 7, 2 + ½·8 = 6, 8.
    rewards, values = side_by_side([[4.0, 2.0, 8.0]]), side_by_side([[7.0, 6.0, 8.0]])
    for smoothing in (0.0, 0.3, 1.0):
        advantages, returns = generalized_advantages(
            rewards, values, mask_of([[0.0] * 3]), discount=0.5, smoothing=smoothing
        )
        assert advantages.tolist() == [[0.0, 0.0, 0.0]]
        assert returns.tolist() == [[7.0, 6.0, 8.0]]


def test_whitening_by_hand() -> None:
    # 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 2 = 7.
    values = torch.tensor([[1.0, 2.0], [6.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    scale = 1 / math.sqrt(7)
    assert_equals_responses(whitened(values, mask), [[-2 * scale, -scale], [3 * scale]], 1e-8)
    selected = whitened(values, mask, shift_mean=False)
    assert_equals_responses(selected, [[3 - 2 * scale, 3 - scale], [3 + 3 * scale]], 1e-8)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("seed", range(12))
def test_random_whitening_equals_the_reference(
    seed: int, dtype: torch.dtype, tolerance: float, shift_mean: bool
) -> None:
    (responses,) = ragged(seed, 1, dtype)
    expected = whitened_responses(responses, shift_mean=shift_mean)
    for fill in FILLS:
        found = whitened(side_by_side(responses, fill, dtype), mask_of(responses), shift_mean=shift_mean)
        assert found.dtype == dtype
        assert_equals_responses(found, expected, tolerance)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("fill", FILLS)
def test_whitened_tokens_have_variance_1_over_the_mask(fill: float, shift_mean: bool) -> None:
    (responses,) = ragged(5, 1, torch.float32)
    moved = [[100.0 + 3.0 * token for token in response] for response in responses]
    mask, values = mask_of(moved), side_by_side(moved, fill, torch.float32)
    tokens = whitened(values, mask, shift_mean=shift_mean)[mask].double()
    assert len(tokens) > 10
    mean = 0.0 if shift_mean else float(values[mask].double().mean())
    assert float(tokens.mean()) == pytest.approx(mean, abs=1e-5)
    assert float(tokens.std()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_what_has_no_spread(shift_mean: bool) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    one = whitened(torch.tensor([[2.5, 9.0], [9.0, 9.0]]), mask, shift_mean=shift_mean)
    assert one.tolist() == [[2.5, 0.0], [0.0, 0.0]]
    alike = whitened(torch.full((2, 2), 2.5), torch.ones(2, 2, dtype=torch.bool), shift_mean=shift_mean)
    assert alike.tolist() == [[0.0 if shift_mean else 2.5] * 2] * 2


def test_the_controller_by_hand() -> None:
    controller = KlController(0.2, target=6.0, horizon=10_000.0)
    # KL / target − 1 = 0.5, cut to 0.2: 0.2·(1 + 0.2·0.0256) = 0.2·1.00512.
    controller.observe(9.0, 256)
    assert controller.coefficient == pytest.approx(0.201024, rel=1e-12)
    # 5.4 / 6 − 1 = −0.1: 0.201024·(1 − 0.1·0.0256) = 0.201024·0.99744.
    controller.observe(5.4, 256)
    assert controller.coefficient == pytest.approx(0.20050937856, rel=1e-12)
    # −1, cut to −0.2: a fifth less at n = horizon.
    controller.observe(0.0, 10_000)
    assert controller.coefficient == pytest.approx(0.20050937856 * 0.8, rel=1e-12)


def test_the_coefficient_rests_at_the_target_and_where_there_is_none() -> None:
    on_target, fixed = KlController(0.2, target=6.0), KlController(0.2)
    for controller in (on_target, fixed):
        controller.observe(6.0, 512)
        assert controller.coefficient == 0.2
    fixed.observe(1000.0, 512)
    assert fixed.coefficient == 0.2


def test_a_random_course_of_the_controller_equals_the_reference() -> None:
    draws = (20.0 * torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).tolist()
    controller, coefficient = KlController(0.05, target=8.0, horizon=2_000.0), 0.05
    for iteration, kl in enumerate(draws):
        responses = 1 + iteration % 64
        controller.observe(kl, responses)
        coefficient = next_coefficient(coefficient, kl=kl, target=8.0, responses=responses, horizon=2_000.0)
        assert controller.coefficient == pytest.approx(coefficient, rel=1e-10)
