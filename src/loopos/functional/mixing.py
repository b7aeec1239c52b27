"""Several distributions over one vocabulary as one.

Enters: the logits of each model for the same positions, and weights. Leaves: logits of the mixture. Left out: which
models, and that their tokens are the same (`models.language_ensemble`).
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
    """One row of logits for each of the members' rows.

    "mean": log Σ_k w_k softmax(z_k) + Σ_k w_k logsumexp(z_k). The constant changes no probability, and gives the logits
    of one model back where all are equal, since a repetition penalty looks at their signs. "logits": Σ_k w_k z_k, whose
    softmax is the weighted geometric mean of the distributions, made to sum to 1 (Hinton 1999, Products of Experts).

    logits z_k: K of `[N, V]`; weights: K numbers of at least 0 that sum to 1 → `[N, V]` fp32.
    """
    assert len(logits) == len(weights), (len(logits), len(weights))
    assert abs(math.fsum(weights) - 1) < 1e-6, weights
    # A weight of 0 is left out: it would make nan of an infinite logit.
    parts = [(each.float(), weight) for each, weight in zip(logits, weights, strict=True) if weight > 0]
    if method == "logits":
        return torch.stack([each * weight for each, weight in parts]).sum(0)
    total, height = torch.full_like(parts[0][0], -math.inf), parts[0][0].new_zeros(())
    for each, weight in parts:
        normaliser = each.logsumexp(-1, keepdim=True)
        total = torch.logaddexp(total, each - normaliser + math.log(weight))
        height = height + weight * normaliser
    return total + height
