"""The config of training a reward model (`RewardModelConfig`) and the checks across its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import AS_IT_IS, MAY_BE_OWN, Location, Text
from loopos.config.learning_rates import rate_notes
from loopos.config.preferences import (
    PreferenceRole,
    PreferenceTextSection,
    RewardSection,
    check_text_files,
    text_effects,
    validation_notes,
)
from loopos.config.sections import (
    ComputationSection,
    DistributedSection,
    EarlyStoppingSection,
    LanguageModelSection,
    LanguageTrainingSection,
    MethodConfig,
    check_distributed,
)

EXAMPLE_ROW = '{"prompt": "Where is my parcel?", "chosen": "It leaves tonight.", "rejected": "Just wait."}'
EXAMPLE_LINES = ", or lines: Prompt: Where is my parcel? / Chosen: It leaves tonight. / Rejected: Just wait."
RewardMetric: TypeAlias = Annotated[
    Literal["loss", "pair_accuracy", "step_accuracy", "step_auroc", "first_error_accuracy", "first_error_f1"],
    MAY_BE_OWN,
    AS_IT_IS,
]
"""Validation metrics of a reward model: the loss of the pairs or steps (nats), the fraction of pairs whose chosen
response has the higher score, and those of step labels (`evaluation.step_metrics`)."""


class RewardEarlyStoppingSection(EarlyStoppingSection):
    """When to stop before the last epoch."""

    # Not the metrics of classification and regression tasks.
    metric: RewardMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric to monitor; training.metric when absent"
    )


class RewardTrainingSection(LanguageTrainingSection):
    """The optimizer, its schedule, what trains, and when to validate, save and stop; a sequence is a comparison."""

    early_stopping: RewardEarlyStoppingSection | None = Field(
        default=None, description="when to stop early; null is never"
    )
    metric: RewardMetric | None = Field(  # type: ignore[assignment]
        default=None,
        description="metric that selects the best checkpoint; pair_accuracy when absent, step_accuracy of step labels",
    )


class PreferenceDataSection(PreferenceTextSection):
    """Where the weights and the preferences come from, how they are read, and where the run goes."""

    source_keys: ClassVar[tuple[str, ...]] = ("preference_data", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("preference_data", "training_data", "validation_data")

    columns: dict[Literal[PreferenceRole, "completions", "labels"], Text | None] = Field(  # type: ignore[assignment]
        default={}, description="column of each role; detected when absent, null for none"
    )
    preference_data: Location | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the preferences to train on'
    )
    training_data: Location | None = Field(default=None, description="another name of preference_data")

    @property
    def source(self) -> str:
        """The rows to train on, under either of the two keys."""
        found = self.preference_data or self.training_data
        assert found is not None, "checked by the method's check"
        return found


class RewardModelConfig(MethodConfig):
    """Config of a reward model run."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: RewardTrainingSection = Field(description="optimizer, schedule and checkpoints")
    reward: RewardSection = Field(default_factory=RewardSection, description="what is learned from a comparison")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: PreferenceDataSection = Field(description="weights, rows and output folder")

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never"

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from checks.check_trainable(training, model.num_layers, data.adapter)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_loss("reward.loss", self.reward.loss, "reward_model")
        yield from checks.check_source({"preference_data": data.preference_data, "training_data": data.training_data})
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )

    def check_files(self) -> Iterator[Problem]:
        rows = (EXAMPLE_ROW, EXAMPLE_LINES)
        yield from check_text_files(
            self.data, {"preference_data": rows, "training_data": rows, "validation_data": rows}
        )

    def notes(self) -> list[str]:
        data, training, reward = self.data, self.training, self.reward
        effects = {**checks.effects(training), **text_effects(data)}
        effects["reward.normalize_over"] = (reward.normalize, "reward.normalize is false")
        notes = checks.without_effect(self, effects) + rate_notes(self, "reward model", has_head=True)
        if "margin" in data.columns and not reward.margins:
            notes.append("data.columns.margin has no effect: reward.margins is false")
        if "p_human" in data.columns and not reward.soft_labels:
            notes.append("data.columns.p_human has no effect: reward.soft_labels is false")
        source = data.preference_data or data.training_data
        return notes + validation_notes(training, data, source, validates=self.validates)
