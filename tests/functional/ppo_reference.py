"""Preference learning and PPO as the papers write them: plain Python, one pair, one response, one token at a time.

Enters: floats, and lists of floats that hold one response each, without pads or masks. Leaves: floats and such lists;
at the end, random ones and the tensors that hold them. Left out: speed, automatic gradients, extreme numbers.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor


def pair_loss(better: float, worse: float, *, probability: float = 1.0, margin: float = 0.0) -> float:
    """Cross-entropy of one pair (Christiano et al. 2017, section 2.2.3): P̂ = e^(b−m) / (e^(b−m) + e^w)."""
    predicted = math.exp(better - margin) / (math.exp(better - margin) + math.exp(worse))
    other = math.exp(worse) / (math.exp(better - margin) + math.exp(worse))
    return -(probability * math.log(predicted) + (1.0 - probability) * math.log(other))


def kl_estimate(logprob: float, reference_logprob: float, estimator: str) -> float:
    """Schulman's note of 2020, in its own letters: x ~ q, r = p(x) / q(x) for KL[q, p]; here q = π, p = π_ref."""
    ratio = math.exp(reference_logprob) / math.exp(logprob)
    if estimator == "k1":
        return -math.log(ratio)
    if estimator == "k2":
        return math.log(ratio) ** 2 / 2.0
    assert estimator == "k3", estimator
    return (ratio - 1.0) - math.log(ratio)


def response_rewards(score: float, kl: list[float], kl_coefficient: float) -> list[float]:
    """Every token pays its KL; the last one is paid the reward model's score (Stiennon et al. 2020, section 3.4)."""
    rewards = []
    for index, term in enumerate(kl):
        is_last = index == len(kl) - 1
        rewards.append((score if is_last else 0.0) - kl_coefficient * term)
    return rewards


def step_advantage(rewards: list[float], values: list[float], start: int, steps: int, discount: float) -> float:
    """Schulman et al. 2016, equation 14: −V(s_t) + r_t + … + γ^(k−1)·r_{t+k−1} + γ^k·V(s_{t+k}), 0 behind the end."""
    total = -values[start]
    for ahead in range(steps):
        total += discount**ahead * rewards[start + ahead]
    if start + steps < len(values):
        total += discount**steps * values[start + steps]
    return total


def response_advantages(rewards: list[float], values: list[float], *, discount: float, smoothing: float) -> list[float]:
    """Schulman et al. 2016, equation 16, by its definition: (1 − λ)·(Â¹ + λ·Â² + λ²·Â³ + …), not by the recursion.

    In a response of T tokens all k-step advantages with t + k ≥ T are the same number, and their weights
    (1 − λ)·(λ^(k−1) + λ^k + …) add up to λ^(k−1).
    """
    advantages = []
    for start in range(len(rewards)):
        remaining = len(rewards) - start
        total = smoothing ** (remaining - 1) * step_advantage(rewards, values, start, remaining, discount)
        for steps in range(1, remaining):
            weight = (1.0 - smoothing) * smoothing ** (steps - 1)
            total += weight * step_advantage(rewards, values, start, steps, discount)
        advantages.append(total)
    return advantages


def whitened_responses(responses: list[list[float]], *, shift_mean: bool) -> list[list[float]]:
    """Huang et al. 2024, on whitening: mean 0 and variance 1 over all tokens of the batch; 10⁻⁸ under the root."""
    tokens = [token for response in responses for token in response]
    if len(tokens) == 1:
        return [list(response) for response in responses]
    mean = statistics.fmean(tokens)
    scale = 1.0 / math.sqrt(statistics.variance(tokens) + 1e-8)
    selected = 0.0 if shift_mean else mean
    return [[(token - mean) * scale + selected for token in response] for response in responses]


def next_coefficient(coefficient: float, *, kl: float, target: float, responses: int, horizon: float) -> float:
    """Ziegler et al. 2019, section 2.2, with K = responses / horizon."""
    error = kl / target - 1.0
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return coefficient * (1.0 + error * responses / horizon)


def policy_token(
    logprob: float, old_logprob: float, advantage: float, *, clip_epsilon: float, dual_clip: float | None
) -> tuple[float, float]:
    """Loss of one token and its derivative by the token's log-probability, case by case.

    Schulman et al. 2017, figure 1: with A > 0 the objective stops growing at 1 + ε, with A < 0 at 1 − ε. Ye et al.
    2020, equation 5: with A < 0 it stops falling at c·A.
    """
    ratio = math.exp(logprob) / math.exp(old_logprob)
    if advantage > 0.0 and ratio > 1.0 + clip_epsilon:
        return -advantage * (1.0 + clip_epsilon), 0.0
    if advantage < 0.0 and ratio < 1.0 - clip_epsilon:
        return -advantage * (1.0 - clip_epsilon), 0.0
    if advantage < 0.0 and dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip, 0.0
    return -advantage * ratio, -advantage * ratio


def value_token(value: float, old_value: float, target: float, *, clip_range: float | None) -> tuple[float, float]:
    """Loss of one value and its derivative by the value, case by case (baselines' PPO2, also in Huang et al. 2024).

    The value may move by c; beyond that it is charged as if it were at the limit, unless its own error is larger.
    """
    own = 0.5 * (value - target) ** 2
    if clip_range is None or abs(value - old_value) <= clip_range:
        return own, value - target
    bound = old_value + clip_range if value > old_value else old_value - clip_range
    charged = 0.5 * (bound - target) ** 2
    return (charged, 0.0) if charged > own else (own, value - target)


def side_by_side(responses: list[list[float]], fill: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Responses on the left of `[B, L]`, with the fill behind them."""
    length = max(map(len, responses))
    return torch.tensor([response + [fill] * (length - len(response)) for response in responses], dtype=dtype)


def mask_of(responses: list[list[float]]) -> Tensor:
    return side_by_side([[1.0] * len(response) for response in responses]).bool()


def ragged(seed: int, kinds: int, dtype: torch.dtype = torch.float64) -> list[list[list[float]]]:
    """So many kinds of numbers for the same 1 to 6 responses of 1 to 9 tokens, each a number of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (1 + seed % 6,), generator=generator).tolist()
    return [[torch.randn(n, generator=generator, dtype=dtype).tolist() for n in lengths] for _ in range(kinds)]
