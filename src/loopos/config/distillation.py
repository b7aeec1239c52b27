"""The config of distillation (`DistillationConfig`): that of `sft`, a teacher, and how the student learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import AS_IT_IS, MAY_BE_OWN, AboveZero, Count, Location, Section, VariantName
from loopos.config.paths import NEW_WEIGHTS, check_weights
from loopos.config.rl import ResponseSection
from loopos.config.sections import EarlyStoppingSection, LanguageTrainingSection
from loopos.config.sft import SftConfig, SftDataSection
from loopos.config.variants import DISTILLATION, LOSSES

DistillationMetric: TypeAlias = Annotated[
    Literal["loss", "forward_kl", "reverse_kl", "nll", "perplexity", "top_token_agreement"], MAY_BE_OWN, AS_IT_IS
]
"""Validation metrics, on the data's own answers: the loss, the KL both ways (nats per token), the negative
log-likelihood and its exponential, and the fraction of positions whose most likely token is the teacher's."""


class DistillationSection(Section):
    """How the student learns from the teacher."""

    loss: Annotated[str, VariantName(LOSSES, only=lambda row: DISTILLATION in row.methods)] = Field(
        default="forward_kl", description="how far the student is from the teacher (`loopos list losses`)"
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="weight of the teacher in the mixture of jsd"
    )
    temperature: AboveZero = Field(default=1.0, description="divisor of the logits of student and teacher in the loss")
    on_policy_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="fraction of the rows whose answer the student writes; the others are the data's own"
    )


class OnPolicySection(ResponseSection):
    """How the student writes answers within the run."""

    every: Count = Field(default=1, description="optimizer steps on the answers of a round")
    temperature: AboveZero = Field(default=1.0, description="divisor of the logits while answers are written")


class DistillationEarlyStoppingSection(EarlyStoppingSection):
    """When to stop before the last epoch."""

    metric: DistillationMetric | None = Field(  # type: ignore[assignment]
        default=None, description="metric to monitor; training.metric when absent"
    )


class DistillationTrainingSection(LanguageTrainingSection):
    """The optimizer, its schedule, what trains, and when to validate, save and stop."""

    early_stopping: DistillationEarlyStoppingSection | None = Field(
        default=None, description="when to stop early; null is never"
    )
    metric: DistillationMetric | None = Field(  # type: ignore[assignment]
        default=None,
        description="metric that selects the best checkpoint; forward_kl, or with a reverse loss reverse_kl, when "
        "absent",
    )


class DistillationDataSection(SftDataSection):
    """Where student, teacher and rows come from, how they are read, and where the run goes."""

    teacher: Location | None = Field(
        default=None,
        description="the teacher's weights, named as pretrained_weights; null with rows that have its "
        "log-probabilities (`loopos sample --logprobs`)",
    )


class DistillationConfig(SftConfig):
    """Config of a run of distillation."""

    training: DistillationTrainingSection = Field(description="optimizer, schedule and checkpoints")
    distillation: DistillationSection = Field(
        default_factory=DistillationSection, description="how the student learns from the teacher"
    )
    online: OnPolicySection = Field(
        default_factory=OnPolicySection, description="with on_policy_fraction, how the student writes answers"
    )
    data: DistillationDataSection = Field(description="student, teacher, rows and output folder")

    @property
    def is_on_policy(self) -> bool:
        """Whether the student writes any answers within the run."""
        return self.distillation.on_policy_fraction > 0

    @property
    def is_sampled(self) -> bool:
        """Whether the loss is one of tokens that the student sampled."""
        return LOSSES[self.distillation.loss].on_policy

    @property
    def default_metric(self) -> str:
        """The metric that chooses the best checkpoint where the config names none."""
        return "reverse_kl" if self.distillation.loss in ("reverse_kl", "sampled_reverse_kl") else "forward_kl"

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        section, data = self.distillation, self.data
        yield from checks.check_loss("distillation.loss", section.loss, DISTILLATION)
        if data.teacher == NEW_WEIGHTS:
            yield Problem(("data.teacher",), f'"{NEW_WEIGHTS}", which knows nothing', "a trained model")
        if data.teacher is None and section.on_policy_fraction > 0:
            fields = ("data.teacher", "distillation.on_policy_fraction")
            hint = "stored log-probabilities are those of the data's answers; the teacher has to read the student's"
            yield Problem(
                fields, f"no teacher with on_policy_fraction {section.on_policy_fraction:g}", "a teacher", hint
            )
        if data.teacher is None and section.temperature != 1.0:
            fields = ("distillation.temperature", "data.teacher")
            hint = "stored log-probabilities are those of temperature 1"
            yield Problem(fields, f"{section.temperature:g} without a teacher", "1, or data.teacher", hint)
        if self.is_sampled:
            yield from self._check_sampled()
        if self.is_on_policy:
            yield from self._check_answers()
        distributed = self.distributed
        if distributed.mode == "shard" or distributed.tensor_parallel > 1:
            keys = ("distributed.mode", "distributed.tensor_parallel")
            hint = "each process reads the output layers of student and teacher whole"
            yield Problem(keys, "a sharded model with distillation", 'mode "replicate" and tensor_parallel 1', hint)

    def _check_sampled(self) -> Iterator[Problem]:
        """Check that the student samples every token of a loss of sampled tokens, from the distribution it learns."""
        section, online = self.distillation, self.online
        if section.on_policy_fraction != 1.0:
            fields = ("distillation.on_policy_fraction", "distillation.loss")
            hint = "the data's answers were not sampled from the student; jsd or reverse_kl learn from both"
            yield Problem(fields, f"{section.on_policy_fraction:g} with {section.loss}", "1", hint)
        for key, value, expected in (
            ("temperature", online.temperature, section.temperature),
            ("top_k", online.top_k, None),
            ("top_p", online.top_p, 1.0),
        ):
            if value != expected:
                fields = (f"online.{key}", "distillation.loss")
                hint = "the loss is one of tokens from the student's whole distribution"
                expected_text = "null" if expected is None else f"{expected:g}"
                if key == "temperature":
                    expected_text += ", that of distillation.temperature"
                yield Problem(fields, f"{value:g} with {section.loss}", expected_text, hint)

    def _check_answers(self) -> Iterator[Problem]:
        """Check that answers have room."""
        limit, longest = self.training.max_length, self.online.max_new_tokens
        if limit is not None and longest >= limit:
            fields = ("online.max_new_tokens", "training.max_length")
            yield Problem(fields, str(longest), f"fewer than max_length ({limit}), which counts prompt and answer")

    def check_files(self) -> Iterator[Problem]:
        yield from super().check_files()
        if self.data.teacher is None:
            return
        yield from check_weights("data.teacher", self.data.teacher)
        if checks.same_path(self.data.teacher, self.data.output_dir):
            fields = ("data.output_dir", "data.teacher")
            yield Problem(fields, f'"{self.data.output_dir}", the folder of the teacher', "another folder")

    def effects(self) -> dict[str, tuple[bool, str]]:
        section = self.distillation
        reads = LOSSES[section.loss].reads
        no_answers = (self.is_on_policy, "distillation.on_policy_fraction is 0")
        return {
            **super().effects(),
            "distillation.beta": (reads is None or "beta" in reads, f"{section.loss} does not read it"),
            **{f"online.{key}": no_answers for key in type(self.online).model_fields},
        }

    def notes(self) -> list[str]:
        notes = super().notes()
        if self.is_on_policy and self.validates and self.training.validate_every == "epoch":
            steps = f"{self.online.every} step{'s' if self.online.every > 1 else ''}"
            notes.append(f"training.validate_every is epoch: with on_policy_fraction, after every {steps}")
        return notes
