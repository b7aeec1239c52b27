"""Reductions over packed tokens, and fp32 gradient sums for half-precision weights.

Autograd adds the gradients of a weight that is used twice (a tied embedding) or of a frequent token in the weight's own
dtype, where small terms vanish. `sum_gradient_of` gives a weight an fp32 buffer; weights without one use autograd.
Letters: T tokens, N sequences, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_reduce(values: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Mean or maximum of the rows of each segment, in fp32.

    values `[T, d]`, lengths `[N]` with sum T → `[N, d]`. `how`: "mean" or "max".
    """
    assert how in ("mean", "max"), how
    return torch.segment_reduce(values.float(), how, lengths=lengths, axis=0)


def weighted_mean(sums: Mapping[str, Tensor], counts: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """Σ_name weight·sum / count over the weighted names: the part of one micro-batch in a step's objective.

    sums: scalars by name. counts: the whole step's counts, over all micro-batches and ranks, so that the
    contributions sum to the mean. A count of 0 gives 0.
    """
    terms = [sums[name] * (weight / counts[name] if counts[name] else 0.0) for name, weight in weights.items()]
    return torch.stack(terms).sum()


_SUM = "_loopos_gradient_sum"


def sum_gradient_of(weight: Tensor, buffer: Callable[[], Tensor]) -> None:
    """Let supporting operations add the gradient of `weight` to `buffer()`, which is fp32 and of its shape."""
    setattr(weight, _SUM, buffer)


def gradient_sum(weight: Tensor) -> Callable[[], Tensor] | None:
    """The function that returns the buffer of a weight; None if it has none or does not train now."""
    found: Callable[[], Tensor] | None = getattr(weight, _SUM, None)
    return found if weight.requires_grad else None


class _SummedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, buffer: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.buffer = buffer
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.buffer().index_add_(0, ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]).float())
        return None, None, None


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """Embedding lookup, `[..., d]` from `[V, d]`; a gradient buffer only receives the rows that were looked up."""
    buffer = gradient_sum(weight)
    if buffer is None or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    apply: Callable[..., Tensor] = _SummedLookup.apply
    return apply(ids, weight, buffer)
