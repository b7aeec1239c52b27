"""The objective of reward models: the response that people prefer gets the higher score.

Enters: batches of comparisons, a model that scores. Leaves: sums and counts. Left out: the model.
Letters: N responses, P pairs, k heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from loopos.data.preference_batches import ComparisonBatch
from loopos.functional.packing import PackedLayout
from loopos.functional.preference_loss import bradley_terry_sum, centring_sum, preferred


@dataclass(frozen=True)
class PairObjective:
    """Bradley–Terry loss of every head, averaged over heads, and optionally `centring` times the mean (r_b + r_w)².
    Names: "loss", "centring" where asked for, and "pair_accuracy" of the mean score, which is reported alone.
    """

    model: Callable[[Tensor, PackedLayout], Tensor]
    centring: float = 0.0

    @property
    def weights(self) -> Mapping[str, float]:
        return {"loss": 1.0, "centring": self.centring} if self.centring else {"loss": 1.0}

    def counts(self, batch: ComparisonBatch) -> Mapping[str, float]:
        weight = float(batch.weights.sum())
        return dict.fromkeys((*self.weights, "pair_accuracy"), weight)

    def loss(self, batch: ComparisonBatch) -> Mapping[str, Tensor]:
        scores = self.model(batch.ids, batch.layout)  # [N, k]
        better, worse = scores[batch.better], scores[batch.worse]  # [P, k]
        each = batch.weights[:, None] / scores.shape[1]
        sums = {
            "loss": bradley_terry_sum(
                better, worse, probabilities=batch.probabilities[:, None], margins=batch.margins[:, None], weights=each
            ),
            "pair_accuracy": (preferred(better.mean(-1), worse.mean(-1)) * batch.weights).sum().detach(),
        }
        if self.centring:
            sums["centring"] = centring_sum(better, worse, weights=each)
        return sums

    def idle(self, batch: ComparisonBatch) -> Tensor:
        return self.model(batch.ids, batch.layout).sum() * 0.0
