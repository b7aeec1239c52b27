"""The pass that judges an iteration's responses, kept for the step that would run it again.

Where an iteration's first step is one batch of all its responses, the models have not changed since they were judged,
and its forward pass is that of judging, gradient graph and all. Enters: what the first step's batches are. Leaves: what
a pass gave, once. Left out: the models.
Letters: M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopos.data.batches import Cursor
from loopos.data.responses import ResponseBatch, ResponseRows


@dataclass(eq=False)
class KeptPass:
    """At most one pass, with its graph. `rows_of`: (step, length of each row) → the rows of each batch of the
    step.
    """

    rows_of: Callable[[Cursor, Sequence[int]], list[list[int]]]
    _kept: tuple[ResponseBatch, tuple[Tensor, ...]] | None = None

    def batch(self, rows: ResponseRows, iteration: int) -> ResponseBatch | None:
        """The batch of the iteration's first step, if that is all of its rows; None where several share them."""
        batches = self.rows_of(Cursor(iteration), rows.lengths)
        return rows(batches[0]) if len(batches) == 1 and len(batches[0]) == len(rows.lengths) else None

    def keep(self, batch: ResponseBatch, outputs: tuple[Tensor, ...]) -> None:
        self._kept = batch, outputs

    def take(self, batch: ResponseBatch) -> tuple[Tensor, ...] | None:
        """What the models gave for this very batch, and forgets it: after a step they give something else."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0].rows != batch.rows or not torch.equal(kept[0].ids, batch.ids):
            return None
        return kept[1]
