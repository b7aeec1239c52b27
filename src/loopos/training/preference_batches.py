"""The steps of preference optimization: which step is the first, and the ranks that AOT compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loopos.data.batches import Cursor, StepBatches
from loopos.data.response_batches import PreferenceBatch
from loopos.training.distributed import World
from loopos.training.preference_objective import PreferenceObjective


@dataclass(frozen=True)
class PreferenceBatches:
    """The comparisons of each step. objective: computes what a step needs before its losses; world: over which ranks
    are taken.
    """

    batches: StepBatches[PreferenceBatch]
    objective: PreferenceObjective
    world: World

    @property
    def num_rows(self) -> int:
        return self.batches.num_rows

    @property
    def rows_a_step(self) -> int:
        return self.batches.rows_a_step

    @property
    def steps_an_epoch(self) -> int:
        return self.batches.steps_an_epoch

    def step(self, cursor: Cursor) -> list[PreferenceBatch]:
        """This rank's micro-batches of the step at `cursor`."""
        found = self.batches.step(cursor)
        if cursor == Cursor() and self.objective.needs_reference:
            found = [replace(batch, is_first=True) for batch in found]
        return ranked(found, self.objective, self.world) if self.objective.needs_ranks else found

    def idle(self) -> PreferenceBatch:
        return self.batches.idle()

    def after(self, cursor: Cursor, losses: Mapping[str, float] | None = None) -> Cursor:
        return self.batches.after(cursor, losses)


@torch.no_grad()
def ranked(batches: Sequence[PreferenceBatch], objective: PreferenceObjective, world: World) -> list[PreferenceBatch]:
    """The batches with the reference's difference of the same rank as each pair's own: over all pairs of all ranks, the
    k-th largest difference (chosen − rejected) of the policy meets the k-th largest of the reference.
    """
    own, reference = [], []
    for batch in batches:
        pairs = objective.score(batch)
        own.append((pairs.chosen - pairs.rejected).tolist())
        reference.append((pairs.chosen_reference - pairs.rejected_reference).tolist())
    parts = [part for part in world.gather_data_parallel((own, reference)) if isinstance(part, tuple)]
    every_own = torch.tensor([value for part in parts for values in part[0] for value in values])
    every_reference = torch.tensor([value for part in parts for values in part[1] for value in values])
    by_rank = torch.empty_like(every_reference)
    by_rank[every_own.argsort(stable=True)] = every_reference.sort(stable=True).values
    start = sum(len(values) for part in parts[: world.data_parallel[0]] for values in part[0])
    found = []
    for batch, values in zip(batches, own, strict=True):
        found.append(replace(batch, sorted_reference=by_rank[start : start + len(values)].to(batch.ids.device)))
        start += len(values)
    return found
