"""From scores to advantages: KL penalty, token rewards, generalised advantage estimation, whitening.

Rows of different length stand side by side on the left, `[B, L]`, with a mask (True = a token of the response). What
lies outside the mask is never read, and is 0 in every result.
Letters: B responses, L tokens of the longest.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


def kl_terms(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """One sample's estimate of KL(π ‖ π_ref) for each token, nats, from tokens drawn from π (Schulman 2020).

    With d = log π − log π_ref: k1 = d (unbiased), k2 = d²/2 (biased, its gradient is that of the KL), k3 = e^−d − 1 + d
    (unbiased, never negative). Both of one shape → that shape. Nothing is clamped.
    """
    difference = logprobs.float() - reference_logprobs.float()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    assert estimator == "k3", estimator
    return torch.expm1(-difference) + difference


def truncated_importance(logprobs: Tensor, behaviour_logprobs: Tensor, *, cap: float) -> Tensor:
    """w = min(π/μ, C): how much a token drawn from μ counts for π (Espeholt et al. 2018, section 4; as a factor of
    PPO's loss, Hilton et al. 2022, section 3). Both of one shape → that shape, fp32.
    """
    return (logprobs.float() - behaviour_logprobs.float()).clamp(max=math.log(cap)).exp()


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coefficient: float) -> Tensor:
    """r_t = −β·kl_t, plus the score at the last token of the response (Ouyang et al. 2022; Ziegler et al. 2019,
    equation 2).

    scores `[B]`, kl and mask `[B, L]` → `[B, L]`.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    lengths = mask.sum(1)
    assert int(lengths.min()) >= 1, "a response without a token"
    rewards[torch.arange(len(scores), device=scores.device), lengths - 1] += scores
    return rewards


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, smoothing: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman et al. 2016, equation 16):

        δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γλ·A_{t+1},   R_t = A_t + V_t

    V_t is the value of the state before token t; behind the last token it is 0, whether the response ended or was cut
    at the limit. rewards, values, mask `[B, L]` → two of `[B, L]`; discount γ, smoothing λ.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * following_value - values[:, t]
        following_advantage = delta + discount * smoothing * following_advantage
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    return advantages, advantages + values


def whitened(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(variance + 10⁻⁸) over all tokens of the mask, with the unbiased variance; with `shift_mean` false
    the mean is put back (Huang et al. 2024). Both `[B, L]` → `[B, L]`; a single token keeps its value.
    """
    chosen = values[mask].double()
    mean = chosen.mean()
    if len(chosen) < 2:
        return values.where(mask, 0.0)
    scaled = (values.double() - mean) * torch.rsqrt(chosen.var() + 1e-8)
    return (scaled if shift_mean else scaled + mean).to(values.dtype).where(mask, 0.0)


class KlController:
    """β of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target − 1, −0.2, 0.2),   β ← β·(1 + e·n / horizon)

    with n the responses of an iteration; KL is the mean of a response's summed token KL, nats.
    """

    def __init__(self, coefficient: float, *, target: float | None = None, horizon: float = 10_000.0) -> None:
        """target: nats a response; None keeps β fixed. horizon: responses."""
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def observe(self, kl: float, responses: int) -> None:
        """Takes the KL of an iteration of so many responses."""
        assert math.isfinite(kl), kl
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * responses / self.horizon
