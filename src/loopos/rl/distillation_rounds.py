"""Rows of on-policy distillation: the student answers prompts of the data, and the teacher scores its tokens (Agarwal
et al. 2024, GKD, algorithm 1; on-policy distillation: Thinking Machines 2025).

A round is what `rounds` describes: the rows of a few steps, of which the student writes the fraction λ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loopos.config.diagnostics import UserError
from loopos.config.distillation import DistillationConfig
from loopos.data.distillation_rows import DistillationBatch, DistilledRow, packed, unpacked
from loopos.evaluation.policy_metrics import length_mean, repetition
from loopos.generation.settings import SamplingParams
from loopos.rl.collector import seeded
from loopos.rl.rollouts import RolloutPlan
from loopos.rl.rounds import Rounds
from loopos.rl.workers.protocol import Request, RolloutEngine


class AnswerRounds(Rounds[DistilledRow, DistillationBatch]):
    """The rows of rounds, of the data and of the student."""

    def tensors_of(self, rows: Sequence[DistilledRow]) -> Mapping[str, Tensor]:
        return packed(rows)

    def rows_from(self, tensors: Mapping[str, Tensor]) -> list[DistilledRow]:
        return unpacked(tensors)


def plan_of(config: DistillationConfig, *, num_rows: int, rank: int, world: int) -> RolloutPlan:
    """The sizes of the rounds: the rows of `online.every` steps. `num_epochs` counts passes over the rows."""
    training, every = config.training, config.online.every
    rows = training.batch_size * training.gradient_accumulation * world * every
    return RolloutPlan(
        num_prompts=num_rows,
        batch_size=rows,
        inner_epochs=1,
        minibatches=every,
        accumulation=training.gradient_accumulation,
        rank=rank,
        world=world,
        seed=training.seed,
        shuffle=training.shuffle,
        iterations=-(-training.num_epochs * num_rows // rows),
    )


def is_written(number: int, fraction: float) -> bool:
    """Whether the student writes the answer of row `number` of the run: evenly spread, so that of any n rows in a row
    n·fraction are written, rounded up or down.
    """
    # Sums of a fraction such as .1 are a little below the whole numbers that they stand for.
    return math.floor((number + 1) * fraction + 1e-9) > math.floor(number * fraction + 1e-9)


@dataclass(frozen=True)
class AnswerWriter:
    """Writes the rows of rounds. `rows`: of the data; `prompts`: ids that the answer of each follows; `longest`: tokens
    of prompt and answer, None for no limit but the model's; `record`: logs a round's metrics and seconds.
    """

    engine: RolloutEngine
    plan: RolloutPlan
    rows: Sequence[DistilledRow]
    prompts: Sequence[list[int]]
    sampling: SamplingParams
    fraction: float
    longest: int | None
    gather: Callable[[object], list[object]]
    record: Callable[[Mapping[str, float], float], None]

    def __call__(self, number: int) -> list[DistilledRow]:
        """The rows of a round by the student as it is, the same on every rank."""
        began = time.monotonic()
        indices = self.plan.prompts_of(number)
        first = number * self.plan.batch_size
        written = [position for position in range(len(indices)) if is_written(first + position, self.fraction)]
        answers = self._answers([indices[position] for position in written], seeded(self.sampling, number))
        found = {position: self.rows[index] for position, index in enumerate(indices)}
        for position, (ids, logprobs, _) in zip(written, answers, strict=True):
            prompt = self.prompts[indices[position]]
            weights = [0.0] * len(prompt) + [1.0] * len(ids)
            found[position] = DistilledRow([*prompt, *ids], weights, None, torch.tensor(logprobs))
        rows = [found[position] for position in range(len(indices)) if any(found[position].weights)]
        if not rows:
            raise UserError(f"round {number + 1}: no answer of the student has a token; raise online.temperature")
        if self.fraction < 1.0:
            rows = [replace(row, sampled_logprobs=None) for row in rows]
        if answers:
            tokens = [ids for ids, _, _ in answers]
            metrics = {
                "iteration": float(number),
                "written": float(len(answers)),
                "response_length": length_mean(tokens),
                "eos_rate": sum(ended for _, _, ended in answers) / len(answers),
                "repetition": repetition(tokens),
            }
            self.record(metrics, time.monotonic() - began)
        return rows

    def _answers(self, indices: Sequence[int], sampling: SamplingParams) -> list[tuple[list[int], list[float], bool]]:
        """Ids, log-probabilities, and whether the answer ended by itself, from all ranks."""
        prompts = [self.prompts[index] for index in indices]
        settings = []
        for position, prompt in enumerate(prompts):
            room = sampling.max_new_tokens if self.longest is None else self.longest - len(prompt)
            each = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
            settings.append(seeded(each, position))
        own = [
            (each.prompt_index, each.token_ids, each.logprobs, each.finish_reason != "length")
            for each in self.engine.write(Request(prompts, settings)).completions
        ]
        every: list[Any] = sorted(answer for part in self.gather(own) if isinstance(part, list) for answer in part)
        return [(ids, logprobs, ended) for _, ids, logprobs, ended in every]
