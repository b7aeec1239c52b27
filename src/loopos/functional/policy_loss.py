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
    dual_clip: float | None = None,
) -> PolicyTerms:
    """max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) with ρ = exp(log π − log π_old) (Schulman et al. 2017, equation 7, as a
    loss).

    dual_clip c > 1: where A < 0 the loss is at most −A·c (Ye et al. 2020, equation 5). All `[M]`.
    """
    difference = logprobs.float() - old_logprobs.float()
    # e^80 is close to the fp32 maximum: a ratio of inf would give nan gradients even where it is clipped.
    ratio = difference.clamp(max=80.0).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    loss = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_bound = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bound, bound, loss)
        is_clipped = is_clipped | is_bound
    return PolicyTerms(loss, ratio.detach(), is_clipped.detach().float(), _approximate_kl(difference))


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
