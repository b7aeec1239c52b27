"""Samples answers to the prompts of an online run and scores them, before anything trains.

Weights, template, engine, sampling and rewards are those of the config's run. Apart from `cli.rl`, whose help needs no
torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopos.config.ppo import PpoConfig
from loopos.evaluation.checkers import Sample
from loopos.evaluation.signal import SampledGroup
from loopos.rl.collector import Collector, request_of, seeded
from loopos.rl.rewards import ENVIRONMENT
from loopos.rl.rollouts import RolloutPlan
from loopos.training.session import session

# Answers that are generated and scored together.
_ANSWERS = 512


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt with its sampled answers. `row`: its row of data."""

    prompt: str
    row: Mapping[str, object]
    group: SampledGroup


@dataclass(frozen=True)
class SignalCheck:
    """`weights`: of the terms of the reward by name. `seconds`: to generate and score all answers."""

    prompts: list[CheckedPrompt]
    weights: dict[str, float]
    seconds: float

    @property
    def is_binary(self) -> bool:
        """Whether all rewards are 0 or 1."""
        return {score for each in self.prompts for score in each.group.scores} <= {0.0, 1.0}


def check_signal(trainer: Any, *, num_prompts: int, num_answers: int) -> SignalCheck:
    """k = num_answers answers to each of the first prompts that training would take. trainer: that of an online
    method, not yet run. Raises
    `UserError`.
    """
    config = trainer.config
    with session(config.training, config.distributed) as (trainer.device, trainer.world):
        trainer.load_data()
        trainer.build_model()
        with trainer.running():
            return _sampled(trainer, config, num_prompts, num_answers)


def _sampled(trainer: Any, config: PpoConfig, num_prompts: int, num_answers: int) -> SignalCheck:
    rewards, origins, tasks = trainer.rewards_of(), trainer.encoder.origins, trainer.tasks
    collector = Collector(trainer.engine, None, rewards, device=trainer.device, origins=origins)
    order = RolloutPlan.of(config.training, num_prompts=len(trainer.prompts), rank=0, world=1).order(0)
    chosen = [*order[:num_prompts]]
    found: list[CheckedPrompt] = []
    size = max(1, _ANSWERS // num_answers)
    began = time.monotonic()
    for number, first in enumerate(range(0, len(chosen), size)):
        numbers = chosen[first : first + size]
        request = request_of(
            [trainer.prompts[index] for index in numbers],
            seeded(trainer.sampling, number),
            num_answers,
            tasks=None if tasks is None else [tasks[index] for index in numbers],
        )
        scored = collector.scored_answers(request, 0)
        for answers in scored:
            group = SampledGroup(
                tuple(Sample(each.response.text, each.response.num_tokens, each.response.ended) for each in answers),
                tuple(each.score for each in answers),
                {name: tuple(each.parts[name] for each in answers) for name in answers[0].parts},
            )
            response = answers[0].response
            found.append(CheckedPrompt(response.prompt, response.row, group))
        trainer.progress.say(f"{len(found)} of {len(chosen)} prompts")
    weights = {each.name: each.weight for each in config.reward.functions}
    if rewards.environment_weight is not None:
        weights = {ENVIRONMENT: rewards.environment_weight, **weights}
    if trainer.roles.reward is not None:
        weights = {"model": config.reward.model_weight, **weights}
    return SignalCheck(found, weights, time.monotonic() - began)


def prompt_rows(check: SignalCheck) -> list[dict[str, Any]]:
    """The rows of the prompts whose answers differ in reward, each with its mean reward as `mean_reward`; a prompt
    without columns has its text as `prompt`.
    """
    return [
        {
            **(dict(each.row) or {"prompt": each.prompt}),
            "mean_reward": sum(each.group.scores) / len(each.group.scores),
        }
        for each in check.prompts
        if each.group.has_signal
    ]
