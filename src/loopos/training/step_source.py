"""What the loop asks of the place where its batches come from.

Enters: a cursor. Leaves: the micro-batches of a step. Left out: who makes them (`data.batches`, `training.rollouts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from loopos.data.batches import Cursor


class Counted(Protocol):
    """What the loop asks of a batch."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def rows(self) -> tuple[int, ...]: ...


BatchT = TypeVar("BatchT", bound=Counted)


class StepSource(Protocol[BatchT]):
    """Where the batches of each step come from: data (`StepBatches`), or what a policy has just written."""

    @property
    def num_rows(self) -> int: ...

    @property
    def rows_a_step(self) -> int: ...

    @property
    def steps_an_epoch(self) -> int: ...

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches of the step at `cursor`."""
        ...

    def idle(self) -> BatchT:
        """A batch for a process that has to run along without rows of its own. Asked for after `step`."""
        ...

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The cursor behind a step with these losses."""
        ...
