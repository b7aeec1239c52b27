"""Reductions over packed rows of tokens.

Letters: T tokens, N sequences, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def segment_reduce(values: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Mean or maximum of the rows of each segment, in fp32.

    values `[T, d]`, lengths `[N]` with sum T → `[N, d]`. `how`: "mean" or "max".
    """
    assert how in ("mean", "max"), how
    return torch.segment_reduce(values.float(), how, lengths=lengths, axis=0)


def weighted_mean(sums: Mapping[str, Tensor], counts: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """Σ_name weight·sum / count over the names that have a weight: the objective of one micro-batch's share of a step.

    sums: scalars by name. counts: the whole step's counts, over all micro-batches and ranks, so that the shares add up
    to the mean. A count of 0 gives 0.
    """
    shares = [sums[name] * (weight / counts[name] if counts[name] else 0.0) for name, weight in weights.items()]
    return torch.stack(shares).sum()
