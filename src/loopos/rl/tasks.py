"""The prompts of a policy: those of the data, or those that an environment begins with for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loopos.config.ppo import PpoConfig
from loopos.data.preference_data import PreferenceData, load_prompts, load_tasks
from loopos.data.prompts import Prompt
from loopos.rl.environments import EnvironmentClass
from loopos.rl.workers.protocol import Task


def load_policy_prompts(config: PpoConfig, environment: EnvironmentClass | None) -> PreferenceData[Prompt]:
    """The prompts to train on and to validate on. Raises `DataError`, and `UserError` for what `reset` raises."""
    data, seed = config.data, config.training.seed
    if environment is None:
        return load_prompts(data, data.source, seed=seed)
    found = load_tasks(data, data.source, seed=seed)
    return replace(found, train=_begun(found.train, environment), validation=_begun(found.validation, environment))


def _begun(rows: Sequence[Prompt], environment: EnvironmentClass) -> list[Prompt]:
    """The rows with the messages that the environment begins with, and its tools."""
    return [
        replace(
            each,
            prompt=tuple(environment.begin(each.row.values, each.row.location)[1]),
            tools=environment.schemas,
        )
        for each in rows
    ]


def tasks_of(prompts: Sequence[Prompt], indices: Sequence[int]) -> list[Task]:
    """What an environment plays of the prompts with these indices."""
    return [Task(prompts[index].row.values, prompts[index].row.location) for index in indices]
