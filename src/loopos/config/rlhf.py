"""The config of reinforcement learning from human feedback (`RlhfConfig`): a reward model, then PPO against it.

The config is split into the configs of the two phases; their `Problem`s are reported under the key names used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from loopos.config.diagnostics import Problem
from loopos.config.keys import Count, Location
from loopos.config.ppo import EXAMPLE_PROMPT, PpoConfig
from loopos.config.preferences import STEP_ROLES, RewardSection, check_text_files
from loopos.config.reward_model import (
    EXAMPLE_LINES,
    EXAMPLE_ROW,
    PreferenceDataSection,
    RewardModelConfig,
    RewardTrainingSection,
)
from loopos.config.rewards import PpoRewardSection
from loopos.config.rl import (
    GuardSection,
    PpoDataSection,
    PpoEvaluationSection,
    PpoTrainingSection,
    RolloutEngineSection,
    RolloutSection,
    check_judge,
)
from loopos.config.sections import ComputationSection, DistributedSection, LanguageModelSection, MethodConfig

REWARD_LEARNING_RATE = 1e-5
"""The default peak learning rate of the reward model, without `reward_training`."""

_SHARED_KEYS = (
    *("pretrained_weights", "adapter", "tokenizer", "chat_template", "on_bad_row", "max_dropped_share"),
    *("validation_share", "split_by", "max_line_bytes", "max_expansion", "max_prompt_tokens", "output_dir"),
)
_SOURCE_KEYS = (
    *("columns", "format", "encoding", "streaming", "max_rows", "training_split", "validation_split", "subset"),
    "validation_data",
)
_OF_BOTH_PHASES = ("data.validation_share", "data.max_dropped_share")
_NAMES_IN_PPO = {"reward.": "rewards."}
_NAMES_IN_REWARD_MODEL = {"training.": "reward_training."}


class RlhfDataSection(PreferenceDataSection):
    """Where the weights, the preferences and the prompts come from, how they are read, and where the run goes."""

    row_keys: ClassVar[tuple[str, ...]] = (*PreferenceDataSection.row_keys, "prompts")

    prompts: Location | None = Field(
        default=None,
        description='file, folder, glob or hub id "org/name" of the prompts to answer; those of the preferences '
        "when absent; columns, format, encoding, splits, streaming, max_rows and validation_data are only of the "
        "preferences",
    )
    max_prompt_tokens: Count | None = Field(
        default=None, description="longest prompt (tokens); max_length - max_new_tokens when absent"
    )


class RlhfConfig(MethodConfig):
    """Config of a run of reinforcement learning from human feedback."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: PpoTrainingSection = Field(description="how policy and values are trained")
    reward_training: RewardTrainingSection | None = Field(
        default=None,
        description="how the reward model is trained; when absent: AdamW with learning_rate 1e-5, and batch_size, "
        "num_epochs, max_length, seed, device and precision of training",
    )
    reward: RewardSection = Field(default_factory=RewardSection, description="the loss of the reward model")
    generation: RolloutSection = Field(default_factory=RolloutSection, description="how responses are generated")
    rollout: RolloutEngineSection = Field(
        default_factory=RolloutEngineSection, description="which processes generate responses"
    )
    rewards: PpoRewardSection = Field(default_factory=PpoRewardSection, description="the reward of a response")
    guards: GuardSection = Field(default_factory=GuardSection, description="limits at which the run alerts")
    evaluation: PpoEvaluationSection = Field(
        default_factory=PpoEvaluationSection, description="how the policy is evaluated while training"
    )
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: RlhfDataSection = Field(description="weights, rows and output folder")

    @property
    def reward_model_dir(self) -> str:
        """The folder of the first phase's run."""
        return os.path.join(self.data.output_dir, "reward_model")

    @property
    def phases(self) -> tuple[MethodConfig, ...]:
        return (self.reward_model_config(), self.ppo_config())

    @property
    def validates(self) -> bool:
        """Whether the second phase ever validates."""
        return self.ppo_config().validates

    def reward_model_config(self) -> RewardModelConfig:
        """The config of the first phase."""
        data, training = self.data, self.training
        reward_training = self.reward_training or RewardTrainingSection(
            learning_rate=REWARD_LEARNING_RATE,
            batch_size=training.batch_size,
            num_epochs=training.num_epochs,
            max_length=training.max_length,
            seed=training.seed,
            device=training.device,
            precision=training.precision,
        )
        read = data.model_dump(include=set(PreferenceDataSection.model_fields), exclude_unset=True)
        return RewardModelConfig(
            description=self.description,
            model=self.model,
            computation=ComputationSection(mode="posttraining", method="reward_model"),
            training=reward_training,
            reward=self.reward,
            distributed=self.distributed,
            data=PreferenceDataSection.model_validate({**read, "output_dir": self.reward_model_dir}),
        )

    def ppo_config(self) -> PpoConfig:
        """The config of the second phase.

        Separate prompts are read with the default reading settings; the prompts of the preferences are read with the
        settings of the preferences.
        """
        data = self.data
        own_prompts = data.prompts is not None
        shared = set(_SHARED_KEYS if own_prompts else _SHARED_KEYS + _SOURCE_KEYS)
        read = data.model_dump(include=shared, exclude_unset=True)
        if "columns" in read:
            # Only prompts are read here.
            read["columns"] = {role: name for role, name in read["columns"].items() if role not in STEP_ROLES}
        values = {
            "reward_model": os.path.join(self.reward_model_dir, "model"),
            "prompts": data.prompts if own_prompts else data.preference_data,
            "training_data": None if own_prompts else data.training_data,
            # "cut" is for responses in the first phase; prompts are never cut.
            "over_length": "error" if data.over_length == "error" else "drop",
        }
        return PpoConfig(
            description=self.description,
            model=self.model,
            computation=ComputationSection(mode="posttraining", method="ppo"),
            training=self.training,
            generation=self.generation,
            rollout=self.rollout,
            reward=self.rewards,
            guards=self.guards,
            evaluation=self.evaluation,
            distributed=self.distributed,
            data=PpoDataSection.model_validate({**read, **values}),
        )

    def check(self) -> Iterator[Problem]:
        renamed = _NAMES_IN_REWARD_MODEL if self.reward_training is not None else {}
        found = [
            *_renamed(self.reward_model_config().check(), renamed),
            *_renamed(self.ppo_config().check_training(), _NAMES_IN_PPO),
        ]
        # Both phases check the keys that both read.
        yield from dict.fromkeys(found)

    def check_files(self) -> Iterator[Problem]:
        rows = (EXAMPLE_ROW, EXAMPLE_LINES)
        examples = dict.fromkeys(("preference_data", "training_data", "validation_data"), rows)
        yield from check_text_files(self.data, {**examples, "prompts": (EXAMPLE_PROMPT, "")})
        yield from check_judge(self.evaluation)

    def notes(self) -> list[str]:
        phases = (
            [_with_name(note, _NAMES_IN_REWARD_MODEL) for note in self.reward_model_config().notes()],
            [_with_name(note, _NAMES_IN_PPO) for note in self.ppo_config().notes()],
        )
        # A key that both phases read has no effect only where it has none in either.
        notes = [
            note
            for note in dict.fromkeys(phases[0] + phases[1])
            if not note.startswith(_OF_BOTH_PHASES) or all(note in phase for phase in phases)
        ]
        if self.rewards.ensemble_penalty > 0 and self.reward.heads == 1:
            notes.append("rewards.ensemble_penalty has no effect: reward.heads is 1")
        return notes


def _renamed(problems: Iterable[Problem], names: Mapping[str, str]) -> Iterator[Problem]:
    for problem in problems:
        yield replace(problem, fields=tuple(_with_name(field, names) for field in problem.fields))


def _with_name(text: str, names: Mapping[str, str]) -> str:
    """Rename the section of the phase's key at the start of `text` to its name here."""
    for name, here in names.items():
        if text.startswith(name):
            return here + text.removeprefix(name)
    return text
