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
    """ "mean": log Σ_k w_k softmax(z_k), which is normalised; "logits": Σ_k w_k z_k, whose softmax is the weighted
    geometric mean of the distributions, made to sum to 1 (Hinton 1999, Products of Experts).

    logits z_k: K of `[N, V]`; weights: K numbers of at least 0 that sum to 1 → `[N, V]` fp32.
    """
    assert len(logits) == len(weights), (len(logits), len(weights))
    assert abs(math.fsum(weights) - 1) < 1e-6, weights
    total: Tensor | None = None
    # A weight of 0 is left out: it would make nan of an infinite logit.
    for each, weight in ((z.float(), w) for z, w in zip(logits, weights, strict=True) if w > 0):
        if method == "mean":
            part = each.log_softmax(-1) + math.log(weight)
            total = part if total is None else torch.logaddexp(total, part)
        else:
            part = each * weight
            total = part if total is None else total + part
    assert total is not None, weights
    return total
