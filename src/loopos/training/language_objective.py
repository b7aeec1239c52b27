"""The objective of language models: the next token.

Enters: batches with or without the weights of their targets. Leaves: sums and counts. Left out: the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loopos.data.batches import Batch, PackedRows, in_step
from loopos.data.tokens import Encoded
from loopos.functional.packing import PackedLayout
from loopos.training.distributed import World

# Tokens of one forward pass of validation.
_TOKENS = 2048


class NextTokenLoss(Protocol):
    """What gives the weighted sum of next-token losses of a row, nats."""

    def __call__(self, ids: Tensor, layout: PackedLayout, weights: Tensor | None = None) -> Tensor: ...


class NextToken:
    """The mean negative log-likelihood of the trained tokens, nats: Σ w·(−log p) / Σ w. One name: "loss"."""

    def __init__(self, model: NextTokenLoss) -> None:
        self.model = model
        self.weights: Mapping[str, float] = {"loss": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The sum of the weights; without weights, tokens that have one before them."""
        if batch.weights is None:
            return {"loss": float(batch.num_tokens - len(batch.rows))}
        return {"loss": float(batch.weights.sum())}

    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": self.model(batch.ids, batch.layout, batch.weights)}

    def idle(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.layout, batch.weights) * 0.0


@torch.no_grad()
def mean_loss(objective: NextToken, rows: Sequence[Encoded], *, device: torch.device, world: World) -> float:
    """Mean loss of rows (nats a trained token) over all ranks, in batches of rows of like length."""
    sums = {"loss": 0.0, "count": 0.0}
    packed = PackedRows(rows, None, device)
    for batch, counts in in_step(packed, tokens=_TOKENS, rank=world.share[0], world=world.share[1]):
        loss = float(objective.loss(batch)["loss"])
        if counts:
            sums["loss"] += loss
            sums["count"] += objective.counts(batch)["loss"]
    total = world.sum_floats(sums)
    return total["loss"] / total["count"]
