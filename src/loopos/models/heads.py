"""Pooling and heads: hidden states of a packed row → one vector a sequence → outputs of the task.

Letters: T tokens, N sequences, d hidden size, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopos.functional.packing import PackedLayout
from loopos.functional.reduce import segment_reduce
from loopos.models.backbone import Backbone

POOLINGS = ("mean", "last", "first", "max")


def pool(hidden: Tensor, layout: PackedLayout, how: str) -> Tensor:
    """One fp32 vector a sequence: the mean, the maximum, the first or the last of its real tokens. hidden `[T, d]`
    → `[N, d]`.
    """
    assert how in POOLINGS, how
    if how == "last":
        return hidden[layout.ends()].float()
    if how == "first":
        return hidden[layout.starts()].float()
    return segment_reduce(hidden, layout.lengths_tensor(), how)


class PooledModel(nn.Module):
    """Backbone, pooling and a linear head without bias (as in transformers' sequence classifiers of causal models):
    `W·pool(h)`.

    The head stays in fp32: it is small, and its logits decide. W is drawn with the model's own `initializer_range`.
    """

    def __init__(self, backbone: Backbone, *, num_outputs: int, pooling: str, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.head = nn.Linear(backbone.hidden_size, num_outputs, bias=False, dtype=torch.float32)
        std = getattr(backbone.model.config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad():
            self.head.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))

    def forward(self, ids: Tensor, layout: PackedLayout, token_types: Tensor | None = None) -> Tensor:
        """ids `[T]`, layout of N sequences → outputs (logits or standardised predictions) `[N, C]` in fp32."""
        pooled = pool(self.backbone(ids, layout, token_types), layout, self.pooling)
        with torch.autocast(pooled.device.type, enabled=False):
            outputs: Tensor = self.head(pooled)
        return outputs
