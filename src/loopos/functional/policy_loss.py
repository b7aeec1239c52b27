"""Per-token losses of proximal policy optimization; the objective sums them and `training.update` divides.

Letters: M tokens of responses. All arithmetic in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Per token, `[M]`: `loss` with gradient; without gradient the `ratio` ρ, `is_clipped` (1 where the clipped term is
    the loss) and `approximate_kl` (k3 of old to new policy).
    """

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor
    approximate_kl: Tensor


def clipped_policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_epsilon: float,
    clip_epsilon_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio: Tensor | None = None,
) -> PolicyTerms:
    """max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε_high)) with ρ = exp(log π − log π_old) (Schulman et al. 2017, equation 7, as a
    loss; with ε_high: Yu et al. 2025, equation 10). ε_high is ε when None.

    dual_clip c > 1: where A < 0 the loss is at most −A·c (Ye et al. 2020, equation 5). log_ratio: log ρ where it is not
    that of each token by itself. All `[M]`.
    """
    difference = logprobs.float() - old_logprobs.float()
    ratio = ratio_of(difference if log_ratio is None else log_ratio)
    plain = -advantages * ratio
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    clipped = -advantages * ratio.clamp(1.0 - clip_epsilon, 1.0 + high)
    loss = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_bound = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bound, bound, loss)
        is_clipped = is_clipped | is_bound
    return PolicyTerms(loss, ratio.detach(), is_clipped.detach().float(), _approximate_kl(difference))


def ratio_of(log_ratio: Tensor) -> Tensor:
    """ρ = e^x. e^80 is close to the fp32 maximum: a ratio of inf would give nan gradients even where it is clipped."""
    return log_ratio.clamp(max=80.0).exp()


def clipped_importance_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_epsilon_high: float
) -> PolicyTerms:
    """−A·min(ρ, 1 + ε_high)·log π, where no gradient flows through the weight ρ, so that every token keeps its gradient
    (CISPO: MiniMax 2025, equation 4, without a lower bound). All `[M]`.
    """
    difference = logprobs.float() - old_logprobs.float()
    ratio = ratio_of(difference.detach())
    weights = ratio.clamp(max=1.0 + clip_epsilon_high)
    loss = -advantages * weights * logprobs.float()
    return PolicyTerms(loss, ratio, (ratio > weights).float(), _approximate_kl(difference))


def summed_by_response(values: Tensor, responses: Tensor, *, mean: bool = False) -> Tensor:
    """Of each token the sum, or the mean, of the values of its response's tokens. responses: the number of each token's
    response, from 0. All `[M]`.
    """
    counts = torch.bincount(responses)
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, responses, values)
    return ((sums / counts.clamp(min=1)) if mean else sums)[responses]


def policy_terms(loss: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> PolicyTerms:
    """The terms of a loss that clips nothing. All `[M]`."""
    difference = (logprobs.float() - old_logprobs.float()).detach()
    ratio = difference.clamp(max=80.0).exp()
    return PolicyTerms(loss, ratio, torch.zeros_like(ratio), _approximate_kl(difference))


def _approximate_kl(difference: Tensor) -> Tensor:
    """k3 of KL(old ‖ new), from tokens of old: e^d − 1 − d with d = log π − log π_old."""
    with torch.no_grad():
        return torch.expm1(difference) - difference


@dataclass(frozen=True, slots=True)
class ValueTerms:
    """Per token, `[M]`: `loss` with gradient; `is_clipped` without (1 where the clipped term is the loss)."""

    loss: Tensor
    is_clipped: Tensor


def clipped_value_terms(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> ValueTerms:
    """½·max((V − R)², (V_clip − R)²) with V_clip = V_old + clip(V − V_old, −c, c) (as the
    baselines' PPO2; Huang et al. 2022). Without a range c, ½·(V − R)². All `[M]`.
    """
    values = values.float()
    plain = (values - returns).square()
    if clip_range is None:
        return ValueTerms(0.5 * plain, torch.zeros_like(plain))
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped = (near - returns).square()
    return ValueTerms(0.5 * torch.maximum(plain, clipped), (clipped > plain).detach().float())
