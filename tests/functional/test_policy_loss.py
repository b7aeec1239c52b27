"""PPO's losses: every case of the clips by hand, the first step's identities, and one token at a time in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_reference import policy_token, value_token

from loopos.functional.policy_loss import PolicyTerms, clipped_policy_terms, clipped_value_terms


def terms_of(
    ratios: list[float], advantages: list[float], dual_clip: float | None = None
) -> tuple[PolicyTerms, list[float]]:
    """The terms at ε = 0.2 of tokens with these ratios, and the loss's gradient by their log-probabilities."""
    old = torch.full((len(ratios),), -1.0)
    logprobs = (old + torch.tensor(ratios).log()).requires_grad_()
    terms = clipped_policy_terms(logprobs, old, torch.tensor(advantages), clip_epsilon=0.2, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    return terms, gradient.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_clipped"),
    [
        # A > 0: the gain stops at 1.2·A; below 0.8 it goes on falling.
        (1.5, 2.0, -2.4, 0.0, 1.0),
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (0.9, 2.0, -1.8, -1.8, 0.0),
        (0.5, 2.0, -1.0, -1.0, 0.0),
        # A < 0: the gain stops at 0.8·A; above 1.2 the loss goes on growing.
        (1.5, -2.0, 3.0, 3.0, 0.0),
        (1.1, -2.0, 2.2, 2.2, 0.0),
        (0.9, -2.0, 1.8, 1.8, 0.0),
        (0.5, -2.0, 1.6, 0.0, 1.0),
        (1.5, 0.0, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_every_case_of_the_clip_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, is_clipped: float
) -> None:
    terms, gradients = terms_of([ratio], [advantage])
    assert float(terms.ratio) == pytest.approx(ratio, rel=1e-6)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradients[0] == pytest.approx(gradient, rel=1e-6)
    assert float(terms.is_clipped) == is_clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_clipped"),
    [
        # c = 3: the loss of a token with A = −2 is at most 6.
        (5.0, -2.0, 6.0, 0.0, 1.0),
        (2.5, -2.0, 5.0, 5.0, 0.0),
        (0.5, -2.0, 1.6, 0.0, 1.0),
        # It does not touch A ≥ 0.
        (5.0, 2.0, -2.4, 0.0, 1.0),
        (0.9, 2.0, -1.8, -1.8, 0.0),
        (5.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, is_clipped: float) -> None:
    terms, gradients = terms_of([ratio], [advantage], dual_clip=3.0)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradients[0] == pytest.approx(gradient, rel=1e-6)
    assert float(terms.is_clipped) == is_clipped


def test_without_a_dual_clip_a_bad_token_costs_all_its_ratio() -> None:
    terms, gradients = terms_of([5.0], [-2.0])
    assert terms.loss.item() == pytest.approx(10.0, rel=1e-6)
    assert gradients == pytest.approx([10.0], rel=1e-6)


def test_the_approximate_kl_by_hand() -> None:
    # ρ − 1 − ln ρ: 2 − 1 − ln 2, ½ − 1 + ln 2, 0. The advantage has no part in it.
    terms, _ = terms_of([2.0, 0.5, 1.0], [1.0, -4.0, 0.0])
    assert terms.approximate_kl.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], rel=1e-6, abs=1e-7)


def test_the_approximate_kls_mean_over_the_old_policy_is_its_kl_to_the_new() -> None:
    old, new = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.5, 0.2, 0.3])
    terms = clipped_policy_terms(new.log(), old.log(), torch.zeros(3), clip_epsilon=0.2)
    exact = sum(p * math.log(p / q) for p, q in zip([0.1, 0.2, 0.7], [0.5, 0.2, 0.3], strict=True))
    assert float((old * terms.approximate_kl).sum()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_first_step_is_the_plain_policy_gradient(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    old = -5.0 * torch.rand(30, generator=generator)
    logprobs = old.clone().requires_grad_()
    advantages = torch.randn(30, generator=generator)
    terms = clipped_policy_terms(logprobs, old, advantages, clip_epsilon=0.2, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert terms.ratio.tolist() == [1.0] * 30
    assert torch.equal(terms.loss, -advantages)
    assert torch.equal(gradient, -advantages)
    assert terms.is_clipped.tolist() == [0.0] * 30
    assert terms.approximate_kl.tolist() == [0.0] * 30


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_equal_the_reference(seed: int, dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, clip_epsilon = 1 + seed % 9, 0.05 + 0.02 * seed
    old = -3.0 * torch.rand(tokens, generator=generator)
    logprobs = (old + 0.5 * torch.randn(tokens, generator=generator)).requires_grad_()
    advantages = torch.randn(tokens, generator=generator)
    terms = clipped_policy_terms(logprobs, old, advantages, clip_epsilon=clip_epsilon, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    for i in range(tokens):
        loss, slope = policy_token(
            logprobs[i].item(), float(old[i]), float(advantages[i]), clip_epsilon=clip_epsilon, dual_clip=dual_clip
        )
        assert terms.loss[i].item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-6, abs=1e-6)
        assert float(terms.is_clipped[i]) == (1.0 if slope == 0.0 else 0.0)


def test_figures_for_the_log_carry_no_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = clipped_policy_terms(logprobs, torch.tensor([-1.5, -1.5]), torch.ones(2), clip_epsilon=0.2)
    values = torch.tensor([0.0, 1.0], requires_grad=True)
    value_terms = clipped_value_terms(values, torch.zeros(2), torch.ones(2), clip_range=0.2)
    assert terms.loss.requires_grad
    assert value_terms.loss.requires_grad
    for figure in (terms.ratio, terms.is_clipped, terms.approximate_kl, value_terms.is_clipped):
        assert not figure.requires_grad


def test_half_precision_logprobs_make_ratios_in_fp32() -> None:
    # Both are bf16 numbers, their ratio e^(2⁻⁷) is not.
    logprobs = torch.tensor([-1.0], dtype=torch.bfloat16)
    old = torch.tensor([-1.0 - 2.0**-7], dtype=torch.bfloat16)
    terms = clipped_policy_terms(logprobs, old, torch.tensor([-3.0]), clip_epsilon=0.2)
    assert float(terms.ratio) == pytest.approx(math.exp(2.0**-7), rel=1e-6)
    assert terms.loss.item() == pytest.approx(3.0 * math.exp(2.0**-7), rel=1e-6)
    assert terms.loss.dtype == terms.ratio.dtype == terms.is_clipped.dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "gradient", "is_clipped"),
    [
        # Moved by 1 towards the return, 0.2 allowed: charged as if at ±0.2, ½·1.8².
        (1.0, 0.0, 2.0, 1.62, 0.0, 1.0),
        (-1.0, 0.0, -2.0, 1.62, 0.0, 1.0),
        (1.5, 1.0, 3.0, 1.62, 0.0, 1.0),
        # Moved away from it: its own error is the greater, ½·2².
        (1.0, 0.0, -1.0, 2.0, 2.0, 0.0),
        (-1.0, 0.0, 1.0, 2.0, -2.0, 0.0),
        # Past the return, whose error at ±0.2 is the smaller: ½·0.9² against ½·0.1²; and the greater: ½·0.1², ½·0.7².
        (1.0, 0.0, 0.1, 0.405, 0.9, 0.0),
        (1.0, 0.0, 0.9, 0.245, 0.0, 1.0),
        # Moved by less than 0.2: ½·1.9².
        (0.1, 0.0, 2.0, 1.805, -1.9, 0.0),
        (-0.1, 0.0, -2.0, 1.805, 1.9, 0.0),
    ],
)
def test_every_case_of_the_value_clip_by_hand(
    value: float, old_value: float, target: float, loss: float, gradient: float, is_clipped: float
) -> None:
    values = torch.tensor([value], requires_grad=True)
    terms = clipped_value_terms(values, torch.tensor([old_value]), torch.tensor([target]), clip_range=0.2)
    (slope,) = torch.autograd.grad(terms.loss.sum(), values)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
    assert float(slope) == pytest.approx(gradient, rel=1e-5)
    assert float(terms.is_clipped) == is_clipped


def test_without_a_range_a_value_pays_half_its_squared_error() -> None:
    values = torch.tensor([1.0, -3.0], requires_grad=True)
    terms = clipped_value_terms(values, torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0]), clip_range=None)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), values)
    # ½·1², ½·4².
    assert terms.loss.tolist() == [0.5, 8.0]
    assert gradient.tolist() == [-1.0, -4.0]
    assert terms.is_clipped.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("clip_range", [None, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_random_values_equal_the_reference(seed: int, clip_range: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 1 + seed % 9
    values, old_values, returns = torch.randn(3, size, generator=generator)
    values = values.clone().requires_grad_()
    terms = clipped_value_terms(values, old_values, returns, clip_range=clip_range)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), values)
    for i in range(size):
        loss, slope = value_token(values[i].item(), float(old_values[i]), float(returns[i]), clip_range=clip_range)
        assert terms.loss[i].item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-6, abs=1e-6)
        assert float(terms.is_clipped[i]) == (1.0 if slope == 0.0 else 0.0)


def test_half_precision_values_are_squared_in_fp32() -> None:
    # (3 + 2⁻⁶)² = 9.09399414062…, of which bf16 keeps 9.125.
    values = torch.tensor([3.0 + 2.0**-6], dtype=torch.bfloat16)
    zero = torch.zeros(1, dtype=torch.bfloat16)
    terms = clipped_value_terms(values, zero, zero, clip_range=0.25)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == 0.5 * (3.0 + 2.0**-6) ** 2


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_ratio_beyond_fp32_has_finite_gradients(advantage: float, dual_clip: float | None) -> None:
    new = torch.tensor([100.0], requires_grad=True)
    terms = clipped_policy_terms(new, torch.zeros(1), torch.tensor([advantage]), clip_epsilon=0.2, dual_clip=dual_clip)
    terms.loss.sum().backward()
    assert terms.loss.isfinite().all()
    assert new.grad is not None
    assert new.grad.isfinite().all()
