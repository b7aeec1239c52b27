"""The objective of language models: the next token.

Enters: batches with or without the weights of their targets. Leaves: sums and counts. Left out: the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from loopos.data.batches import Batch
from loopos.functional.packing import PackedLayout


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
