"""From scores to advantages: KL penalty, token rewards, generalized advantage estimation, whitening.

Responses of different length are left-aligned in `[B, L]` with a mask (True = a token of the response). Values outside
the mask are never read; results are 0 there.
Letters: B responses, L tokens of the longest.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Baseline: TypeAlias = Literal["group", "leave_one_out", "batch", "none"]
Scale: TypeAlias = Literal["group", "batch", "none"]
KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


def kl_terms(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) in nats, from tokens sampled from π (Schulman 2020).

    With d = log π − log π_ref: k1 = d (unbiased), k2 = d²/2 (biased, its gradient is that of the KL), k3 = e^−d − 1 + d
    (unbiased, never negative). Inputs of one shape → that shape. Nothing is clamped.
    """
    difference = logprobs.float() - reference_logprobs.float()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    assert estimator == "k3", estimator
    return torch.expm1(-difference) + difference


def truncated_importance(logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weight w = min(π/μ, C) of a token sampled from μ (Espeholt et al. 2018, section 4).

    As a factor of PPO's loss: Hilton et al. 2022, section 3. Inputs of one shape → that shape, fp32.
    """
    return (logprobs.float() - behavior_logprobs.float()).clamp(max=math.log(cap)).exp()


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coefficient: float) -> Tensor:
    """r_t = −β·kl_t, plus the score at the last token of the response (Ouyang et al. 2022; Ziegler et al. 2019,
    equation 2).

    scores `[B]`, kl and mask `[B, L]` → `[B, L]`.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    lengths = mask.sum(1)
    assert int(lengths.min()) >= 1, "a response without tokens"
    rewards[torch.arange(len(scores), device=scores.device), lengths - 1] += scores
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, smoothing: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman et al. 2016, equation 16):

        δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γλ·A_{t+1},   R_t = A_t + V_t

    V_t is the value of the state before token t; after the last token it is 0, whether the response ended or was
    truncated. rewards, values, mask `[B, L]` → two of `[B, L]`; discount γ, smoothing λ.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = delta + discount * smoothing * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


# Added to a standard deviation that divides, as in TRL: rewards that differ only by rounding have no signal.
_SCALE_EPSILON = 1e-4


def relative_rewards(rewards: Tensor, groups: Tensor, *, baseline: Baseline, scale: Scale) -> Tensor:
    """(r − b) / s of each response, against the other responses of its iteration.

    b: the mean of the response's group ("group"; Shao et al. 2024), of the other responses of the group
    ("leave_one_out"; Kool et al. 2019, Ahmadian et al. 2024), or of all responses ("batch"); "none" is 0.
    s: the standard deviation, with Bessel's correction, of the group or of all responses, plus 10⁻⁴; "none" is 1. A
    group of one response has the mean of itself as baseline, and the standard deviation 0.
    rewards `[B]`, groups `[B]`: the number of each response's group, from 0 → `[B]` fp32.
    """
    values = rewards.double()
    counts = torch.bincount(groups).double()
    sums = torch.zeros_like(counts).index_add(0, groups, values)
    means = (sums / counts.clamp(min=1.0))[groups]
    centered = values
    if baseline == "group":
        centered = values - means
    elif baseline == "leave_one_out":
        # r − (Σ − r)/(n − 1) = (r − mean)·n/(n − 1).
        centered = (values - means) * (counts / (counts - 1.0).clamp(min=1.0))[groups]
    elif baseline == "batch":
        centered = values - values.mean()
    if scale == "group":
        squares = torch.zeros_like(counts).index_add(0, groups, (values - means).square())
        centered = centered / ((squares / (counts - 1.0).clamp(min=1.0)).sqrt()[groups] + _SCALE_EPSILON)
    elif scale == "batch":
        centered = centered / ((values.std() if len(values) > 1 else 0.0) + _SCALE_EPSILON)
    return centered.float()


def future_rewards(rewards: Tensor, mask: Tensor, *, discount: float = 1.0) -> Tensor:
    """R_t = r_t + γ·R_{t+1}: the discounted rewards from token t on. rewards, mask `[B, L]` → `[B, L]`."""
    rewards = rewards.where(mask, 0.0)
    found = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = rewards[:, t] + discount * following
        found[:, t] = following
    return found


def overlong_penalty(length: int, *, longest: int, buffer: int) -> float:
    """The soft over-length penalty of a response (Yu et al. 2025, equation 13), from 0 to 1: 0 up to `longest` −
    `buffer` tokens, then rising evenly to 1 at `longest`.
    """
    return min(max((length - (longest - buffer)) / buffer, 0.0), 1.0)


def whitened(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(variance + 10⁻⁸) over all tokens of the mask, with the unbiased variance.

    With `shift_mean` false the mean is added back (Huang et al. 2024). `[B, L]` → `[B, L]`; a single token keeps its
    value.
    """
    chosen = values[mask].double()
    mean = chosen.mean()
    if len(chosen) < 2:
        return values.where(mask, 0.0)
    scaled = (values.double() - mean) * torch.rsqrt(chosen.var() + 1e-8)
    return (scaled if shift_mean else scaled + mean).to(values.dtype).where(mask, 0.0)


class KlController:
    """The coefficient β of the KL penalty, fixed or adaptive (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target − 1, −0.2, 0.2),   β ← β·(1 + e·n / horizon)

    with n responses per iteration; KL is the mean over responses of the summed token KL, in nats.
    """

    def __init__(self, coefficient: float, *, target: float | None = None, horizon: float = 10_000.0) -> None:
        """`target` in nats per response; None keeps β fixed. `horizon` in responses."""
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def observe(self, kl: float, responses: int) -> None:
        """Update β with the KL of an iteration of `responses` responses."""
        assert math.isfinite(kl), kl
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * responses / self.horizon
