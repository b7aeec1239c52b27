"""The minibatches of a policy's own update, out of what it has just written.

Enters: a function that writes an iteration's experience. Leaves: `ResponseBatch`es, minibatch by minibatch, inner
epoch by inner epoch; for checkpoints, the experience in use. Left out: what experience is (`experience.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopos.config.rl import PpoTrainingSection
from loopos.data.batches import Cursor, deal, shuffled
from loopos.rl.experience import Experience, ResponseBatch, ResponseRows


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """The numbers of an online run. `num_prompts`: in the data. `batch_size`: responses of an iteration over all
    processes. `iterations`: of the whole run; `planned_end`: what ends it then, "epochs" or "max_iterations".
    """

    num_prompts: int
    batch_size: int
    inner_epochs: int
    minibatches: int
    accumulation: int
    rank: int
    world: int
    seed: int
    shuffle: bool = True
    approximate_kl_limit: float | None = None
    iterations: int = 0
    planned_end: str = "epochs"

    @classmethod
    def of(cls, settings: PpoTrainingSection, *, num_prompts: int, rank: int, world: int) -> RolloutPlan:
        """What a config's `training` section asks for."""
        batch_size = settings.batch_size * world
        iterations = -(-settings.num_epochs * num_prompts // batch_size)
        limit = settings.max_iterations
        return cls(
            num_prompts=num_prompts,
            batch_size=batch_size,
            inner_epochs=settings.inner_epochs,
            minibatches=settings.minibatches,
            accumulation=settings.gradient_accumulation,
            rank=rank,
            world=world,
            seed=settings.seed,
            shuffle=settings.shuffle,
            approximate_kl_limit=settings.approximate_kl_limit,
            iterations=min(iterations, limit or iterations),
            planned_end="max_iterations" if limit is not None and limit < iterations else "epochs",
        )

    def prompts_of(self, iteration: int) -> list[int]:
        """The prompts of an iteration, of all processes: each pass over the data in an order of its own."""
        found = []
        for number in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
            turn, place = divmod(number, self.num_prompts)
            found.append(int(self._order(turn)[place]))
        return found

    def _order(self, turn: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        return shuffled(self.num_prompts, self.seed, turn)

    def batches_of(self, cursor: Cursor, lengths: Sequence[int]) -> list[list[int]]:
        """This process's micro-batches of a minibatch, as places in an iteration's responses of these lengths."""
        inner, part = divmod(cursor.step, self.minibatches)
        # The third number keeps these draws apart from those of the prompts.
        order = np.random.Generator(np.random.PCG64([self.seed, cursor.epoch, 1 + inner])).permutation(len(lengths))
        group = np.array_split(order, self.minibatches)[part].tolist()
        slots = deal([lengths[row] for row in group], self.accumulation * self.world, len(group))
        mine = [[group[place] for place in slot] for slot in slots[self.rank :: self.world]]
        return [chosen for chosen in mine if chosen]


class RolloutBatches:
    """Minibatches of experience, an iteration an epoch of the loop: `collect` writes the responses of an iteration with
    the policy as it is, then `inner_epochs` passes go over them in `minibatches` shuffled parts.

    Prompts are taken in turn from an order drawn anew for every pass over them; which, depends on the iteration alone.
    An iteration ends early where a step's approximate KL is above the limit.
    """

    def __init__(self, plan: RolloutPlan, collect: Callable[[int], Experience], device: torch.device) -> None:
        """collect: iteration → its experience, the same on every process."""
        self.plan, self.device = plan, device
        self._collect = collect
        self.experience: Experience | None = None
        self._rows: ResponseRows | None = None

    @property
    def num_rows(self) -> int:
        return self.plan.num_prompts

    @property
    def rows_a_step(self) -> int:
        return self.plan.batch_size

    @property
    def steps_an_epoch(self) -> int:
        return self.plan.inner_epochs * self.plan.minibatches

    def step(self, cursor: Cursor) -> list[ResponseBatch]:
        """This process's micro-batches of a minibatch; at the first of an iteration, the responses are written."""
        if self.experience is None:
            assert cursor.step == 0, f"no experience at {cursor}"
            self.experience = self._collect(cursor.epoch)
        if self._rows is None:
            self._rows = self.experience.rows(self.device)
        plan, rows = self.plan, self._rows
        mine = plan.batches_of(cursor, rows.lengths)
        is_first = cursor.step == 0 and self.experience.is_own
        return [rows(chosen, is_first=is_first) for chosen in mine]

    def idle(self) -> ResponseBatch:
        """A batch of the first response."""
        assert self._rows is not None, "asked for after a step"
        return self._rows([0])

    def after(self, cursor: Cursor, losses: Mapping[str, float]) -> Cursor:
        """The next minibatch, or the next iteration."""
        limit = self.plan.approximate_kl_limit
        too_far = limit is not None and losses["approximate_kl"] > limit
        if too_far or cursor.step + 1 == self.steps_an_epoch:
            self.experience = self._rows = None
            return Cursor(cursor.epoch + 1, 0)
        return Cursor(cursor.epoch, cursor.step + 1)

    def tensors(self) -> Mapping[str, Tensor]:
        """The experience in use, for a checkpoint."""
        return {} if self.experience is None else self.experience.tensors()

    def state(self) -> dict[str, Any]:
        held = self.experience
        return {
            "kl_coefficient": None if held is None else held.kl_coefficient,
            "is_own": None if held is None else held.is_own,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on from `tensors` and `state`."""
        self._rows = None
        self.experience = None
        if tensors:
            self.experience = Experience.of_tensors(tensors, state["kl_coefficient"], is_own=state["is_own"])
