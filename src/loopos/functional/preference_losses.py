"""Losses of preference optimization: DPO and its relatives.

Each takes a `Pairs` and `LossSettings` and returns one loss per pair, `[P]`; the objective weighs and sums them, and
`training.update` divides. `config.variants.LOSSES` names them and says which need a reference.
Letters: P pairs of a chosen response c and a rejected response r; π the policy, ρ the reference. All in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]

# exp(80) is close to the fp32 maximum; larger ratios would give gradients of nan.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the losses share. `beta`: the strength β of the pull to the reference (ORPO: of the odds ratio; SimPO: of
    the mean log-probability). `label_smoothing`: the probability ε that a pair's order is wrong. `simpo_margin`: γ.
    `discopop_temperature`: τ of DiscoPOP.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_margin: float = 0.5
    discopop_temperature: float = 0.05
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of both responses of each pair, all `[P]`, in nats.

    `chosen`, `rejected`: log π(y|x), summed over the tokens of the response. `chosen_reference`,
    `rejected_reference`: log ρ(y|x), without gradient; 0 for losses without a reference. `chosen_tokens`,
    `rejected_tokens`: numbers of tokens. `probabilities`: how likely the chosen response is the better one (1 for a
    certain pair). `margins`: what β times the difference must exceed. `sorted_reference`: for each pair, the
    reference's difference of the same rank within the optimizer step (used by AOT).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    probabilities: Tensor
    margins: Tensor
    sorted_reference: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(c|x) − log ρ(c|x), `[P]`."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        """log π(r|x) − log ρ(r|x), `[P]`."""
        return self.rejected - self.rejected_reference

    def gap(self, settings: LossSettings) -> Tensor:
        """β·(f'(ratio of c) − f'(ratio of r)) − margin, `[P]`: what a pairwise loss reads; f is the divergence."""
        chosen, rejected = (divergence_slope(ratio, settings) for ratio in (self.chosen_ratio, self.rejected_ratio))
        return settings.beta * (chosen - rejected) - self.margins

    def gap_per_token(self, settings: LossSettings) -> Tensor:
        """f'(ratio of c)/|c| − f'(ratio of r)/|r|, `[P]`."""
        chosen, rejected = (divergence_slope(ratio, settings) for ratio in (self.chosen_ratio, self.rejected_ratio))
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens


def divergence_slope(ratio: Tensor, settings: LossSettings) -> Tensor:
    """f'(t) at t = exp(ratio), up to a constant, for the divergence that keeps the policy near the reference (Wang et
    al. 2023, "Beyond reverse KL", table 1): log t for the reverse KL, −1/t for the forward KL, log(2t/(1+t)) for Jensen
    and Shannon, (1 − t^−α)/α for α. Constants cancel between the two responses. `[P]` → `[P]`.
    """
    if settings.divergence == "reverse_kl":
        return ratio
    if settings.divergence == "forward_kl":
        return -torch.exp((-ratio).clamp(max=_LARGEST_EXPONENT))
    if settings.divergence == "jensen_shannon":
        return math.log(2.0) + F.logsigmoid(ratio)
    alpha = settings.divergence_alpha
    return (1.0 - torch.exp((-alpha * ratio).clamp(max=_LARGEST_EXPONENT))) / alpha


def wpo_weights(logprobs: Tensor, collisions: Tensor, response: Tensor, lengths: Tensor) -> Tensor:
    """How likely the policy is to write each response, as the weight of a pair's loss is the product of both (WPO: Zhou
    et al. 2024, equation 2, with the sampled alignment of section 3.2).

    w(y) = exp(mean over the tokens of log π(y_t) − log Σ_v π(v)²), without gradient: 1 if each token is as likely as a
    draw from the policy expects, so long responses and certain policies are not at a disadvantage.

    logprobs log π(y_t), collisions log Σ_v π(v)², response (the index among N responses of each token) `[M]`; lengths
    `[N]` in tokens → `[N]`.
    """
    aligned = (logprobs - collisions).detach()
    return (torch.zeros_like(lengths).index_add(0, response, aligned) / lengths).exp()


def _cross_entropy(gap: Tensor, probabilities: Tensor, smoothing: float) -> Tensor:
    """−p·log σ(gap) − (1 − p)·log σ(−gap), with p moved from the label towards its opposite by ε. `[P]`."""
    p = probabilities * (1.0 - smoothing) + (1.0 - probabilities) * smoothing
    return -p * F.logsigmoid(gap) - (1.0 - p) * F.logsigmoid(-gap)


def sigmoid(pairs: Pairs, settings: LossSettings) -> Tensor:
    """DPO: Rafailov et al. 2023, equation 7; with label_smoothing cDPO: Mitchell 2023.

    −log σ(Δ), Δ = β·(log π/ρ(c) − log π/ρ(r)).
    """
    return _cross_entropy(pairs.gap(settings), pairs.probabilities, settings.label_smoothing)


def sigmoid_norm(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Length-normalized DPO: Lambert et al. 2024 (Tülu 3).

    −log σ(β·(log π/ρ(c)/|c| − log π/ρ(r)/|r|)).
    """
    gap = settings.beta * pairs.gap_per_token(settings) - pairs.margins
    return _cross_entropy(gap, pairs.probabilities, settings.label_smoothing)


def robust(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Robust DPO: Chowdhury et al. 2024, equation 7.

    (−(1 − ε)·log σ(Δ) + ε·log σ(−Δ)) / (1 − 2ε).
    """
    gap, epsilon = pairs.gap(settings), settings.label_smoothing
    clean = _cross_entropy(gap, pairs.probabilities, 0.0)
    flipped = _cross_entropy(-gap, pairs.probabilities, 0.0)
    return ((1.0 - epsilon) * clean - epsilon * flipped) / (1.0 - 2.0 * epsilon)


def ipo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """IPO: Azar et al. 2023, equation 17, per token as its authors corrected.

    (log π/ρ(c)/|c| − log π/ρ(r)/|r| − 1/(2β))².
    """
    return (pairs.gap_per_token(settings) - 1.0 / (2.0 * settings.beta)).square()


def hinge(pairs: Pairs, settings: LossSettings) -> Tensor:
    """SLiC: Zhao et al. 2023; Liu et al. 2023 (RSO), equation 3.

    max(0, 1 − Δ).
    """
    return torch.relu(1.0 - pairs.gap(settings))


def exo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """EXO: Ji et al. 2024, equation 16; ε of 0 is read as 0.001.

    σ(Δ)·(log σ(Δ) − log(1 − ε)) + σ(−Δ)·(log σ(−Δ) − log ε).
    """
    gap, epsilon = pairs.gap(settings), settings.label_smoothing or 1e-3
    better, worse = F.logsigmoid(gap), F.logsigmoid(-gap)
    return better.exp() * (better - math.log1p(-epsilon)) + worse.exp() * (worse - math.log(epsilon))


def nca(pairs: Pairs, settings: LossSettings) -> Tensor:
    """NCA: Chen et al. 2024, algorithm 1 for two responses.

    −log σ(β·log π/ρ(c)) − ½·log σ(−β·log π/ρ(c)) − ½·log σ(−β·log π/ρ(r)).
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco(pairs: Pairs, settings: LossSettings) -> Tensor:
    """BCO: Jung et al. 2024, for pairs, without the shift δ.

    −log σ(β·log π/ρ(c)) − log σ(−β·log π/ρ(r)).
    """
    return -F.logsigmoid(settings.beta * pairs.chosen_ratio) - F.logsigmoid(-settings.beta * pairs.rejected_ratio)


def sppo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """SPPO: Wu et al. 2024, equation 4.7 with certain preferences.

    (log π/ρ(c) − 1/(2β))² + (log π/ρ(r) + 1/(2β))².
    """
    half = 0.5 / settings.beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


def aot(pairs: Pairs, settings: LossSettings) -> Tensor:
    """AOT: Melnyk et al. 2024, paired.

    −log σ(β·(d_(k) − e_(k))), d = log π(c) − log π(r), e = log ρ(c) − log ρ(r), (k) the rank in the step.
    """
    assert pairs.sorted_reference is not None, "ranks are computed before the loss"
    gap = settings.beta * (pairs.chosen - pairs.rejected - pairs.sorted_reference)
    return _cross_entropy(gap, pairs.probabilities, settings.label_smoothing)


def apo_zero(pairs: Pairs, settings: LossSettings) -> Tensor:
    """APO-zero: D'Oosterlinck et al. 2024, equation 7.

    1 − σ(β·log π/ρ(c)) + σ(β·log π/ρ(r)).
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, settings: LossSettings) -> Tensor:
    """APO-down: D'Oosterlinck et al. 2024, equation 8.

    σ(β·log π/ρ(c)) + 1 − σ(Δ).
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(pairs: Pairs, settings: LossSettings) -> Tensor:
    """DiscoPOP (log-ratio modulated loss): Lu et al. 2024, equation 5.

    −(1 − m)·log σ(Δ) + m·exp(−Δ), m = σ(Δ/τ).
    """
    gap = pairs.gap(settings)
    mix = torch.sigmoid(gap / settings.discopop_temperature)
    return -(1.0 - mix) * F.logsigmoid(gap) + mix * torch.exp((-gap).clamp(max=_LARGEST_EXPONENT))


def simpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """SimPO: Meng et al. 2024, equation 6.

    −log σ(β·(log π(c)/|c| − log π(r)/|r|) − γ).
    """
    gap = settings.beta * (pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens)
    return _cross_entropy(gap - settings.simpo_margin - pairs.margins, pairs.probabilities, settings.label_smoothing)


def cpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """CPO: Xu et al. 2024, equation 3 (its likelihood term is the loss sft).

    −log σ(β·(log π(c) − log π(r))).
    """
    gap = settings.beta * (pairs.chosen - pairs.rejected) - pairs.margins
    return _cross_entropy(gap, pairs.probabilities, settings.label_smoothing)


def orpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """ORPO: Hong et al. 2024, equation 7 (its likelihood term is the loss sft).

    −β·log σ(log odds(c) − log odds(r)), odds = p/(1 − p), p = exp(log π(y)/|y|).
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    odds = chosen - rejected - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return settings.beta * _cross_entropy(odds, pairs.probabilities, settings.label_smoothing)


def likelihood(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Likelihood: the term of ORPO, CPO, MPO and RPO.

    −log π(c), as the mean over the tokens of all chosen responses of the step.
    """
    return -pairs.chosen


def _log_one_minus_exp(value: Tensor) -> Tensor:
    """log(1 − exp(v)) for v < 0, exact near 0 and far from it (Mächler 2012). `[P]` → `[P]`."""
    value = value.clamp(max=-1e-7)
    near = value > -math.log(2.0)
    safe_near, safe_far = torch.where(near, value, -1.0), torch.where(near, -1.0, value)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def kto_losses(
    ratios: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """λ_D·(1 − σ(β·ratio − z)) for desirable answers, λ_U·(1 − σ(z − β·ratio)) for others, with z = β·`baseline`
    (KTO: Ethayarajh et al. 2024, equation 8). ratios log π/ρ(y|x) `[N]`, desirable `[N]` bool, baseline: the
    estimate of KL(π ‖ ρ), nats, scalar without gradient, at least 0 → `[N]`.
    """
    gap = beta * (ratios - baseline)
    good, bad = desirable_weight * torch.sigmoid(-gap), undesirable_weight * torch.sigmoid(gap)
    return torch.where(desirable, good, bad)
