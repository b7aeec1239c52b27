"""The root-mean-square norm with a backward pass of its own, in fewer passes over the states than autograd's.

Enters: states and a weight. Leaves: the normed states, with gradients. Left out: which modules compute so
(`models/lean_norm.py`).
Letters: d hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float()
        inverse = torch.linalg.vecdot(wide, wide)[..., None].div_(states.shape[-1]).add_(epsilon).rsqrt_()
        normed = (wide * inverse).to(states.dtype)
        ctx.save_for_backward(normed, weight, inverse)
        found: Tensor = normed * weight
        return found

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normed, weight, inverse = ctx.saved_tensors
        wide = normed.float()
        d_normed = d_output.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_normed * wide).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        # With n = x·r and r = (mean x² + ε)^−½: dx = r·(dn − n·mean(dn ⊙ n)).
        d_normed = d_normed * weight.float()
        mean = torch.linalg.vecdot(d_normed, wide)[..., None].div_(wide.shape[-1])
        d_states = d_normed.addcmul_(wide, mean, value=-1).mul_(inverse)
        return d_states.to(d_output.dtype), d_weight, None


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w ⊙ x / √(mean x² + ε), `[..., d]` → `[..., d]`, the mean over the last dimension in fp32; what it divides is
    rounded to the format of x before w scales it, as in Llama's layers.

    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    apply: Callable[..., Tensor] = _RmsNorm.apply
    return apply(states, weight, epsilon)
