"""Rounds: rows that the model in training makes itself, learned in a few steps before it makes the next ones.

For the training loop a round is an epoch, whose rows are made by the model as it is at its first step. Online
preference optimization makes comparisons, on-policy distillation the student's answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from loopos.data.batches import BatchT, Cursor, Rows
from loopos.rl.rollouts import RolloutPlan
from loopos.training.distributed import World

RowT = TypeVar("RowT")


class Rounds(ABC, Generic[RowT, BatchT]):
    """The rows of rounds, divided evenly over the steps of each. A round with fewer rows than steps ends early. It is
    part of the checkpoint, so that a resumed run has the same rows.
    """

    def __init__(
        self, plan: RolloutPlan, write: Callable[[int], list[RowT]], rows_of: Callable[[list[RowT]], Rows[BatchT]]
    ) -> None:
        """write: number of a round → its rows, the same on every rank."""
        self.plan, self._write, self._rows_of = plan, write, rows_of
        self.made: list[RowT] = []
        self._rows: Rows[BatchT] | None = None

    @abstractmethod
    def tensors_of(self, rows: Sequence[RowT]) -> Mapping[str, Tensor]:
        """The rows of a round, at least one, for a checkpoint."""

    @abstractmethod
    def rows_from(self, tensors: Mapping[str, Tensor]) -> list[RowT]:
        """The rows of `tensors_of`."""

    @property
    def num_rows(self) -> int:
        return self.plan.num_prompts

    @property
    def rows_a_step(self) -> int:
        return self.plan.batch_size // (self.plan.responses_per_prompt * self.plan.minibatches)

    @property
    def steps_an_epoch(self) -> int:
        return self.plan.minibatches

    def step(self, cursor: Cursor) -> list[BatchT]:
        """This rank's micro-batches; the first step of a round makes its rows."""
        if not self.made:
            assert cursor.step == 0, f"no rows at {cursor}"
            self.made = self._write(cursor.epoch)
        if self._rows is None:
            self._rows = self._rows_of(self.made)
        rows = self._rows
        return [rows(chosen) for chosen in self.plan.batches_of(cursor, rows.lengths)]

    def idle(self) -> BatchT:
        """A batch of the first row."""
        assert self._rows is not None, "idle is called after step"
        return self._rows([0])

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The next step, or the next round."""
        if cursor.step + 1 < min(self.steps_an_epoch, len(self.made)):
            return Cursor(cursor.epoch, cursor.step + 1)
        self.made, self._rows = [], None
        return Cursor(cursor.epoch + 1, 0)

    def synchronize(self, world: World) -> None:
        """All ranks have the same rows."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The rows of the round, for a checkpoint."""
        return self.tensors_of(self.made) if self.made else {}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores `tensors`."""
        self._rows, self.made = None, self.rows_from(tensors) if tensors else []
