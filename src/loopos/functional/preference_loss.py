"""The losses of a reward model: of pairs of responses, and of steps.

Apart from `training.objectives`, which calls it by name: a pure function of tensors.
Letters: P pairs, M steps. All arithmetic in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_sum(
    better: Tensor,
    worse: Tensor,
    *,
    probabilities: Tensor | None = None,
    margins: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Σ_i w_i·`bradley_terry`_i; w the weight of each pair (1 where None). All `[P]` → scalar. Its count is Σ w."""
    loss = bradley_terry(better, worse, probabilities=probabilities, margins=margins)
    return loss.sum() if weights is None else (loss * weights).sum()


def bradley_terry(
    better: Tensor, worse: Tensor, *, probabilities: Tensor | None = None, margins: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the preferences under Bradley and Terry's model, in nats:
    −p_i·log σ(Δ_i) − (1 − p_i)·log σ(−Δ_i) with Δ_i = r_better − r_worse − margin_i.

    p is the probability that the better one is preferred (1 if None: Bradley and Terry 1952; Christiano et al. 2017,
    section 2.2.3, with soft labels as there), the margin that of Touvron et al. 2023 (Llama 2, section 3.2.2; 0 where
    None). All `[P]` → `[P]`.
    """
    gap = better.float() - worse.float()
    if margins is not None:
        gap = gap - margins
    loss = -F.logsigmoid(gap)
    if probabilities is not None:
        loss = probabilities * loss - (1.0 - probabilities) * F.logsigmoid(-gap)
    return loss


def center_rewards_sum(better: Tensor, worse: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Σ_i w_i·(r_better + r_worse)²: keeps scores near 0, which the Bradley–Terry loss leaves free (Eisenstein et al.
    2023, section 4). All `[P]` → scalar. Its count is Σ w.
    """
    squares = (better.float() + worse.float()).square()
    return squares.sum() if weights is None else (squares * weights).sum()


def preferred(better: Tensor, worse: Tensor) -> Tensor:
    """1 where the better response has the higher score, ½ where both are equal, else 0. `[P]` → `[P]` fp32."""
    gap = better.float() - worse.float()
    return (torch.sign(gap) + 1.0) / 2.0


def step_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of step labels, in nats: −y_i·log σ(s_i) − (1 − y_i)·log σ(−s_i) for the score s of a
    step and the probability y that it is right (Uesato et al. 2022; Lightman et al. 2023).

    It is the cross-entropy of two classes with logits (−s/2, s/2). Both `[M]` → `[M]`.
    """
    scores = scores.float()
    return -labels * F.logsigmoid(scores) - (1.0 - labels) * F.logsigmoid(-scores)
