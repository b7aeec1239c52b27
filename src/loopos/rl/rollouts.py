"""Minibatches of rollouts for the updates of an online method. `experience.py` defines the experience."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    """The sizes of an online run. `num_prompts`: in the data. `batch_size`: responses per iteration over all processes,
    of which `responses_per_prompt` answer each prompt, one after another. `iterations`: of the whole run.
    `planned_end`: what ends it, "epochs" or "max_iterations".
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
    responses_per_prompt: int = 1

    @classmethod
    def of(
        cls,
        settings: PpoTrainingSection,
        *,
        num_prompts: int,
        rank: int,
        world: int,
        responses_per_prompt: int = 1,
    ) -> RolloutPlan:
        """From a config's `training` section."""
        batch_size = settings.batch_size * world
        iterations = -(-settings.num_epochs * num_prompts * responses_per_prompt // batch_size)
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
            responses_per_prompt=responses_per_prompt,
        )

    @property
    def num_groups(self) -> int:
        """Prompts of an iteration."""
        return self.batch_size // self.responses_per_prompt

    def other_prompts(self, iteration: int, attempt: int, used: Collection[int], number: int) -> list[int]:
        """So many prompts in place of some of an iteration, in the `attempt`-th time from 1. They depend on the
        iteration and on the prompts that it used; those come again only where no other ones are left.
        """
        # The fourth number separates these draws from those of minibatches.
        random = np.random.Generator(np.random.PCG64([self.seed, iteration, 0, attempt]))
        order = random.permutation(self.num_prompts).tolist()
        fresh = [index for index in order if index not in used] + [index for index in order if index in used]
        return [fresh[position % len(fresh)] for position in range(number)]

    def prompts_of(self, iteration: int) -> list[int]:
        """Indices of an iteration's prompts, one for each response, for all processes. Each pass over the data has its
        own order.
        """
        prompts: list[int] = []
        for number in range(iteration * self.num_groups, (iteration + 1) * self.num_groups):
            turn, index = divmod(number, self.num_prompts)
            prompts += [int(self.order(turn)[index])] * self.responses_per_prompt
        return prompts

    def order(self, turn: int) -> np.ndarray:
        """Indices of all prompts in the order of a pass over the data."""
        if not self.shuffle:
            return np.arange(self.num_prompts)
        return shuffled(self.num_prompts, self.seed, turn)

    def batches_of(self, cursor: Cursor, lengths: Sequence[int], *, group_size: int = 1) -> list[list[int]]:
        """This process's micro-batches of a minibatch, as indices into an iteration's rows of these lengths.

        group_size: so many rows that follow each other stay in one minibatch, if there are as many groups as
        minibatches, and in one micro-batch, if there are as many groups as micro-batches.
        """
        inner, part = divmod(cursor.step, self.minibatches)
        each = group_size if len(lengths) // group_size >= self.minibatches else 1
        # The third number separates these draws from those of the prompts.
        random = np.random.Generator(np.random.PCG64([self.seed, cursor.epoch, 1 + inner]))
        order = random.permutation(len(lengths) // each)
        units = [list(range(unit * each, (unit + 1) * each)) for unit in np.array_split(order, self.minibatches)[part]]
        num_slots = self.accumulation * self.world
        if len(units) < num_slots:
            units = [[row] for unit in units for row in unit]
        slots = deal([sum(lengths[row] for row in unit) for unit in units], num_slots, len(units))
        own = [[row for index in slot for row in units[index]] for slot in slots[self.rank :: self.world]]
        return [chosen for chosen in own if chosen]

    def response_batches(self, cursor: Cursor, lengths: Sequence[int]) -> list[list[int]]:
        """`batches_of` of an iteration's responses, those to one prompt together."""
        return self.batches_of(cursor, lengths, group_size=self.responses_per_prompt)


class RolloutBatches:
    """Minibatches of experience. One epoch of the training loop is one iteration: `collect` generates responses with
    the current policy, then `inner_epochs` passes go over them in `minibatches` shuffled parts.

    The prompts of an iteration depend only on its number. An iteration ends early after a step whose approximate KL
    exceeds the limit.
    """

    def __init__(
        self,
        plan: RolloutPlan,
        collect: Callable[[int], Experience],
        device: torch.device,
        *,
        share_prompts: bool = False,
    ) -> None:
        """collect: iteration → its experience, the same on every process. share_prompts: as in `ResponseRows`."""
        self.plan, self.device, self.share_prompts = plan, device, share_prompts
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
        """This process's micro-batches of a minibatch; the first step of an iteration generates the responses."""
        if self.experience is None:
            assert cursor.step == 0, f"no experience at {cursor}"
            self.experience = self._collect(cursor.epoch)
        if self._rows is None:
            self._rows = self.experience.rows(self.device, share_prompts=self.share_prompts)
        plan, rows = self.plan, self._rows
        own = plan.response_batches(cursor, rows.lengths)
        is_first = cursor.step == 0 and self.experience.is_own
        return [rows(chosen, is_first=is_first) for chosen in own]

    def idle(self) -> ResponseBatch:
        """A batch of the first response."""
        assert self._rows is not None, "idle is called after step"
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
        """The current experience, for a checkpoint."""
        return {} if self.experience is None else self.experience.tensors()

    def state(self) -> dict[str, Any]:
        experience = self.experience
        return {
            "kl_coefficient": None if experience is None else experience.kl_coefficient,
            "is_own": None if experience is None else experience.is_own,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores `tensors` and `state`."""
        self._rows = None
        self.experience = None
        if tensors:
            self.experience = Experience.of_tensors(tensors, state["kl_coefficient"], is_own=state["is_own"])
