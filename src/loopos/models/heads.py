"""Pooling and heads: hidden states of a packed row → one vector per sequence → outputs of the task.

Letters: T tokens, N sequences, d hidden size, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopos.functional.packing import PackedLayout
from loopos.functional.reductions import segment_reduce
from loopos.models.active_adapters import AdapterView
from loopos.models.backbone import Backbone

POOLINGS = ("mean", "last", "first", "max")


def pool(hidden: Tensor, layout: PackedLayout, how: str) -> Tensor:
    """One fp32 vector per sequence: the mean, the maximum, the first or the last of its tokens. hidden `[T, d]` → `[N,
    d]`. Sequences with a shared prefix give one vector per continuation, only with "last".
    """
    assert how == "last" or layout.segments is None, how
    assert how in POOLINGS, how
    if how == "last":
        return hidden[layout.last_tokens()].float()
    if how == "first":
        return hidden[layout.starts()].float()
    return segment_reduce(hidden, layout.lengths_tensor(), how)


class PooledModel(nn.Module):
    """Backbone, pooling and a linear head without bias, `W·pool(h)`, as transformers' sequence classifiers of causal
    models.

    The head stays in fp32: it is small, and its logits decide.
    """

    def __init__(
        self,
        backbone: Backbone | AdapterView,
        *,
        num_outputs: int,
        pooling: str,
        seed: int,
        head_std: float | None = None,
    ) -> None:
        """backbone: its own, or a view of one that belongs to another module. head_std: standard deviation of the
        initial W, 0 for a head of zeros; None for the model's own `initializer_range`.
        """
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.head = nn.Linear(backbone.hidden_size, num_outputs, bias=False, dtype=torch.float32)
        if head_std is None:
            head_std = getattr(backbone.model.config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad():
            self.head.weight.normal_(0.0, head_std, generator=torch.Generator().manual_seed(seed))

    def forward(
        self, ids: Tensor, layout: PackedLayout, token_types: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """ids `[T]`, layout of N sequences → outputs (logits or standardized predictions) `[N, C]` in fp32; with
        positions `[M]` those of these tokens instead, `[M, C]`.
        """
        hidden = self.backbone(ids, layout, token_types)
        if positions is not None:
            return self.outputs(hidden[positions].float())
        return self.outputs(pool(hidden, layout, self.pooling))

    def outputs(self, vectors: Tensor) -> Tensor:
        """Vectors `[N, d]` → outputs `[N, C]`, in fp32 under autocast too."""
        with torch.autocast(vectors.device.type, enabled=False):
            outputs: Tensor = self.head(vectors.float())
        return outputs


def scalar_head_std(hidden_size: int) -> float:
    """1/√(d + 1): the standard deviation of a new reward head (Stiennon et al. 2020; Huang et al. 2024)."""
    return float((hidden_size + 1) ** -0.5)
