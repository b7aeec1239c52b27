"""The prompts of a policy: those of the data, or those that an environment begins with for each row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from loopos.config.ppo import PpoConfig
from loopos.data.preference_data import PreferenceData, load_prompts, load_tasks
from loopos.data.prompts import Prompt
from loopos.rl.contained_environments import instances_of
from loopos.rl.environments import EnvironmentClass
from loopos.rl.tool_runs import Instances
from loopos.rl.workers.protocol import Task


def load_policy_prompts(config: PpoConfig, environment: EnvironmentClass | None) -> PreferenceData[Prompt]:
    """The prompts to train on and to validate on. Raises `DataError`, and `UserError` for what `reset` raises."""
    data, seed = config.data, config.training.seed
    if environment is None:
        return load_prompts(data, data.source, seed=seed)
    assert config.environment is not None, "an environment has a section"
    found = load_tasks(data, data.source, seed=seed)
    with closing(instances_of(environment, config.environment)) as instances:
        train, validation = (_begun(rows, instances, environment) for rows in (found.train, found.validation))
    return replace(found, train=train, validation=validation)


def _begun(rows: Sequence[Prompt], instances: Instances, environment: EnvironmentClass) -> list[Prompt]:
    """The rows with the messages that the environment begins with, and its tools."""
    openings = instances.openings([each.row.values for each in rows], [each.row.location for each in rows])
    return [
        replace(each, prompt=tuple(messages), tools=environment.schemas)
        for each, messages in zip(rows, openings, strict=True)
    ]


def tasks_of(prompts: Sequence[Prompt], indices: Sequence[int]) -> list[Task]:
    """What an environment plays of the prompts with these indices."""
    return [Task(prompts[index].row.values, prompts[index].row.location) for index in indices]
