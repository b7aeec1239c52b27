"""What a policy has just written, as the minibatches of its own update.

Enters: responses with their scores, by a function that writes those of an iteration. Leaves: `ResponseBatch`es,
minibatch by minibatch, inner epoch by inner epoch; for checkpoints, the experience in use. Left out: generation,
scoring, the formulas (`functional.advantages`).
Letters: B responses of an iteration over all processes, L tokens of the longest, M tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopos.config.ppo_sections import PpoTrainingSection
from loopos.data.batches import Cursor, deal
from loopos.data.responses import ResponseBatch, ResponseRows
from loopos.functional.advantages import (
    KlEstimator,
    generalised_advantages,
    kl_terms,
    token_rewards,
    whitened,
)

_COLUMNS = ("old_logprobs", "reference_logprobs", "values", "advantages", "returns")


@dataclass(frozen=True)
class Experience:
    """The responses of one iteration, of all processes. The tensors are `[M]` fp32 on CPU, response after response.
    `kl_coefficient`: β that was in the rewards.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coefficient: float

    def rows(self, device: torch.device) -> ResponseRows:
        lengths = [len(response) for response in self.responses]
        columns = {name: torch.split(getattr(self, name), lengths) for name in _COLUMNS}
        return ResponseRows(self.prompts, self.responses, device, columns)

    def tensors(self) -> dict[str, Tensor]:
        """All but `kl_coefficient`, for a checkpoint."""
        told = {name: getattr(self, name) for name in _COLUMNS}
        for name, texts in (("prompts", self.prompts), ("responses", self.responses)):
            told[name] = torch.tensor([token for ids in texts for token in ids])
            told[f"{name}_lengths"] = torch.tensor([len(ids) for ids in texts])
        return told

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], kl_coefficient: float) -> Experience:
        """What `tensors` was made of."""
        texts = {
            name: [part.tolist() for part in torch.split(tensors[name], tensors[f"{name}_lengths"].tolist())]
            for name in ("prompts", "responses")
        }
        columns = {name: tensors[name].clone() for name in _COLUMNS}
        return cls(**texts, **columns, kl_coefficient=kl_coefficient)  # type: ignore[arg-type]  # names of its fields


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How scores become advantages. `penalty`: estimator of the KL in the rewards, None where it is a loss instead."""

    penalty: KlEstimator | None
    discount: float
    gae_lambda: float
    whiten_rewards: bool
    whiten_advantages: bool

    @classmethod
    def of(cls, settings: PpoTrainingSection) -> AdvantageSettings:
        """Those of a config's `training` section."""
        return cls(
            penalty=settings.penalty_estimator if settings.kl_in == "reward" else None,
            discount=settings.discount,
            gae_lambda=settings.gae_lambda,
            whiten_rewards=settings.whiten_rewards,
            whiten_advantages=settings.whiten_advantages,
        )


def experience_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    scores: Sequence[float],
    *,
    logprobs: Sequence[Tensor],
    reference_logprobs: Sequence[Tensor],
    values: Sequence[Tensor],
    kl_coefficient: float,
    settings: AdvantageSettings,
) -> Experience:
    """Advantages and returns of responses: r_t = −β·kl_t, plus the score at the end; GAE; whitening over all tokens.
    The sequences of tensors hold one a response, a number a token.
    """
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, L]

    def side_by_side(each: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([column.float() for column in each], batch_first=True)

    new, reference, state_values = map(side_by_side, (logprobs, reference_logprobs, values))
    penalty = torch.zeros_like(new) if settings.penalty is None else kl_terms(new, reference, settings.penalty)
    rewards = token_rewards(torch.tensor(scores), penalty, mask, kl_coefficient=kl_coefficient)
    if settings.whiten_rewards:
        rewards = whitened(rewards, mask, shift_mean=False)
    advantages, returns = generalised_advantages(
        rewards, state_values, mask, discount=settings.discount, smoothing=settings.gae_lambda
    )
    if settings.whiten_advantages:
        advantages = whitened(advantages, mask)
    return Experience(
        [list(prompt) for prompt in prompts],
        [list(response) for response in responses],
        old_logprobs=new[mask],
        reference_logprobs=reference[mask],
        values=state_values[mask],
        advantages=advantages[mask],
        returns=returns[mask],
        kl_coefficient=kl_coefficient,
    )


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """The numbers of an online run. `num_prompts`: in the data. `batch_size`: responses of an iteration over all
    processes. `iterations`: of the whole run.
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

    @classmethod
    def of(cls, settings: PpoTrainingSection, *, num_prompts: int, rank: int, world: int) -> RolloutPlan:
        """What a config's `training` section asks for."""
        batch_size = settings.batch_size * world
        iterations = -(-settings.num_epochs * num_prompts // batch_size)
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
            iterations=min(iterations, settings.max_iterations or iterations),
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
        return np.random.Generator(np.random.PCG64([self.seed, turn])).permutation(self.num_prompts)


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
        inner, part = divmod(cursor.step, plan.minibatches)
        # The third number keeps these draws apart from those of the prompts.
        order = np.random.Generator(np.random.PCG64([plan.seed, cursor.epoch, 1 + inner])).permutation(
            len(rows.lengths)
        )
        group = np.array_split(order, plan.minibatches)[part].tolist()
        slots = deal([rows.lengths[row] for row in group], plan.accumulation * plan.world, len(group))
        mine = [[group[place] for place in slot] for slot in slots[plan.rank :: plan.world]]
        return [rows(chosen, is_first=cursor.step == 0) for chosen in mine if chosen]

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
        return {"kl_coefficient": None if self.experience is None else self.experience.kl_coefficient}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on from `tensors` and `state`."""
        self._rows = None
        self.experience = Experience.of_tensors(tensors, state["kl_coefficient"]) if tensors else None


assert set(_COLUMNS) < {field.name for field in fields(Experience)}
