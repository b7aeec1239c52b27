"""Mix the distributions of several models over one vocabulary.

Letters: K models, N positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

MixtureMethod: TypeAlias = Literal["mean", "logits"]


def mixed_logits(logits: Sequence[Tensor], weights: Sequence[float], method: MixtureMethod) -> Tensor:
    """Logits of the mixture, one row for each position.

    "mean": log Σ_k w_k softmax(z_k) + Σ_k w_k logsumexp(z_k). The constant does not change probabilities; with equal
    models it returns their logits, because a repetition penalty depends on their signs. "logits": Σ_k w_k z_k, whose
    softmax is the normalized weighted geometric mean of the distributions (Hinton 1999, Products of Experts).

    logits z_k: K of `[N, V]`; weights: K numbers of at least 0 that sum to 1 → `[N, V]` fp32.
    """
    assert len(logits) == len(weights), (len(logits), len(weights))
    assert abs(math.fsum(weights) - 1) < 1e-6, weights
    # Skip weights of 0: 0 times an infinite logit is nan.
    parts = [(each.float(), weight) for each, weight in zip(logits, weights, strict=True) if weight > 0]
    if method == "logits":
        return torch.stack([each * weight for each, weight in parts]).sum(0)
    total, offset = torch.full_like(parts[0][0], -math.inf), parts[0][0].new_zeros(())
    for each, weight in parts:
        normalizer = each.logsumexp(-1, keepdim=True)
        total = torch.logaddexp(total, each - normalizer + math.log(weight))
        offset = offset + weight * normalizer
    return total + offset
