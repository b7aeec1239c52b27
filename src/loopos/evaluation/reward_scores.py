"""Scores of responses by a reward model, and what they say of it.

Enters: a scoring model, encoded comparisons or token ids. Leaves: raw scores of every head, normalised scores, metrics.
Left out: training, the model's folder (`models.task_folder`).
Letters: N responses, P pairs, k heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopos.data.batches import PackedRows, in_order, in_step
from loopos.data.preference_batches import ComparisonRows
from loopos.data.tokens import Encoded
from loopos.evaluation.outputs import NonFiniteOutputs
from loopos.functional.packing import PackedLayout

Scorer = Callable[[Tensor, PackedLayout], Tensor]
"""ids `[T]`, layout → raw scores `[N, k]`."""

# Tokens of one forward pass.
_TOKENS = 2048


@dataclass(frozen=True)
class Normalisation:
    """Raw scores → (raw − mean) / std of each head, `[k]`: reference responses have mean 0 and standard deviation 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, scores: Tensor) -> Normalisation:
        """That of raw scores `[N, k]`."""
        scores = scores.double()
        std = scores.std(0, correction=0).clamp_min(1e-8)
        return cls(tuple(scores.mean(0).tolist()), tuple(std.tolist()))

    @classmethod
    def none(cls, heads: int) -> Normalisation:
        return cls((0.0,) * heads, (1.0,) * heads)

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Normalisation:
        """That of a model folder's description."""
        return cls(tuple(description["score_mean"]), tuple(description["score_std"]))

    def __call__(self, raw: Tensor, *, ensemble_penalty: float = 0.0) -> Tensor:
        """Raw scores `[N, k]` → scores `[N]` fp32: the heads' mean, less `ensemble_penalty` standard deviations of them
        (Coste et al. 2024, section 3: uncertainty-weighted optimization).
        """
        scores = (raw.float() - torch.tensor(self.mean, device=raw.device)) / torch.tensor(self.std, device=raw.device)
        mean = scores.mean(-1)
        if ensemble_penalty == 0.0 or scores.shape[-1] == 1:
            return mean
        return mean - ensemble_penalty * scores.std(-1, correction=0)


@torch.no_grad()
def raw_scores(model: Scorer, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Raw scores `[N, k]` on CPU of token rows, each prompt and response, in their order. Raises `NonFiniteOutputs`."""
    encoded = PackedRows([Encoded(list(ids), None, place) for place, ids in enumerate(rows)], None, device)
    found: dict[int, Tensor] = {}
    for batch in in_order(encoded, tokens=_TOKENS):
        found.update(zip(batch.rows, model(batch.ids, batch.layout).float().cpu(), strict=True))
    return _finite(torch.stack([found[place] for place in range(len(rows))]))


@torch.no_grad()
def comparison_scores(
    model: Scorer, rows: ComparisonRows, *, rank: int = 0, world: int = 1
) -> dict[int, list[list[float]]]:
    """The place of each comparison of this rank's share → raw scores of its responses, a list of k each. Raises
    `NonFiniteOutputs`.
    """
    found: dict[int, list[list[float]]] = {}
    every: list[Tensor] = []
    for batch, counts in in_step(rows, tokens=_TOKENS, rank=rank, world=world):
        scores, first = model(batch.ids, batch.layout).float().cpu(), 0
        for row in batch.rows if counts else ():
            count = len(rows.examples[row].responses)
            found[row] = scores[first : first + count].tolist()
            first += count
        if counts:
            every.append(scores)
    if every:
        _finite(torch.cat(every))
    return found


def _finite(scores: Tensor) -> Tensor:
    """The raw scores `[N, k]`. Raises `NonFiniteOutputs`: a mean or a rank of what is no number says nothing."""
    if bad := int((~scores.isfinite().all(-1)).sum()):
        raise NonFiniteOutputs(
            f"the reward model's scores of {bad} of {len(scores)} responses are not finite numbers; lower "
            "training.learning_rate if this is its training, use precision fp32 or other weights if it is trained"
        )
    return scores
