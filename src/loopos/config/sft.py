"""The config of supervised fine-tuning (`SftConfig`) and the checks across its keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import BUILT_IN_METRICS, Count, Location, Section, Text
from loopos.config.learning_rates import rate_notes
from loopos.config.paths import (
    check_adapter,
    check_output_folder,
    check_rows,
    check_tokenizer,
    check_weights,
)
from loopos.config.sections import (
    ComputationSection,
    DistributedSection,
    LanguageModelSection,
    LanguageTrainingSection,
    MethodConfig,
    TextSourceSection,
    check_distributed,
)

EXAMPLE_ROW = (
    '{"messages": [{"role": "user", "content": "Where is my parcel?"}, '
    '{"role": "assistant", "content": "It leaves tonight."}]}'
)
TextRole: TypeAlias = Literal[
    "problem",
    "reasoning",
    "answer",
    "messages",
    "instruction",
    "input",
    "context",
    "choices",
    "output",
    "history",
    "prompt",
    "completion",
    "text",
    "system",
    "tools",
]


class SftDataSection(TextSourceSection):
    """Where the weights and the rows come from, how they are read, and where the run goes."""

    pretrained_weights: Location = Field(
        description='"smollm2-135m", "new", a folder, a .gguf, .safetensors or .bin file, or a hub id "org/name"'
    )
    adapter: Location | None = Field(
        default=None, description="PEFT adapter over the weights, or a run with one, that trains on (trainable: lora)"
    )
    tokenizer: Location | None = Field(
        default=None, description="folder, file or hub id of the tokenizer; the weights' own when absent"
    )
    new_tokens: list[Text] = Field(
        default=[], description="tokens that are added to the tokenizer; their rows start as the mean of their pieces'"
    )
    new_special_tokens: list[Text] = Field(
        default=[], description="the same for special tokens, which decoding leaves out"
    )
    training_data: Location = Field(description='file, folder, glob or hub id "org/name" of the rows to train on')
    columns: dict[TextRole, Text | None] = Field(
        default={}, description="column of each role; detected when absent, null for none"
    )
    chat_template: Location = Field(
        default="auto",
        description='"auto" (the tokenizer\'s own, else plain), "plain", or a file with a Jinja template',
    )
    train_on: Literal["all", "assistant", "answer"] = Field(
        default="assistant", description="tokens that are trained; the end token always is"
    )
    over_length: Literal["drop", "cut", "error"] = Field(
        default="drop", description="what happens to a row over max_length; cut removes its end, with the end token"
    )
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="largest fraction of rows that drop may remove"
    )

    @property
    def source_key(self) -> str:
        """The key that names the rows to train on."""
        return next((key for key in self.source_keys if getattr(self, key) is not None), self.source_keys[0])

    @property
    def source(self) -> str:
        """The rows to train on."""
        found: str | None = getattr(self, self.source_key)
        assert found is not None, "checked by the method's check"
        return found


class SftGenerationSection(Section):
    """How responses are generated for validation and samples."""

    max_new_tokens: Count = Field(default=256, description="longest response (tokens)")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="divisor of the logits; 0 is greedy decoding"
    )
    top_k: Count | None = Field(default=None, description="sample from the k most likely tokens; null is all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the smallest set of tokens with this total probability"
    )


class SftEvaluationSection(Section):
    """What is generated while training."""

    samples: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="validation conversations or prompts answered as samples for the report; 0 is none",
    )
    every: Count = Field(default=1, description="generate answers in every n-th validation")


class SftConfig(MethodConfig):
    """Config of a run of supervised fine-tuning."""

    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Validation metrics that a config may name."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: LanguageTrainingSection = Field(description="optimizer, schedule and checkpoints")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: SftDataSection = Field(description="weights, rows and output folder")
    generation: SftGenerationSection = Field(
        default_factory=SftGenerationSection, description="how samples are generated"
    )
    evaluation: SftEvaluationSection = Field(
        default_factory=SftEvaluationSection, description="what is generated while training"
    )

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never"

    @property
    def generates(self) -> bool:
        """Whether validation generates answers to problems and checks them."""
        return False

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from checks.check_trainable(training, model.num_layers, data.adapter)
        yield from checks.check_new_tokens(data.new_tokens, data.new_special_tokens)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_source({key: getattr(data, key) for key in data.source_keys})
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )
        yield from checks.check_no_head(training)
        for field, metric in self.named_metrics():
            if metric in BUILT_IN_METRICS - set(self.metrics):
                expected = f"one of {', '.join(self.metrics)}" if len(self.metrics) > 1 else f'"{self.metrics[0]}"'
                yield Problem((field,), f'"{metric}"', expected)

    def named_metrics(self) -> list[tuple[str, Any]]:
        """The keys that name a metric, with the metric; None where a key is not set."""
        stopping = self.training.early_stopping
        named = [("training.metric", self.training.metric)]
        return named if stopping is None else [*named, ("training.early_stopping.metric", stopping.metric)]

    def example_row(self, source: str) -> str:
        """A row as the config's files hold them, for the message about a missing one."""
        return EXAMPLE_ROW

    def check_files(self) -> Iterator[Problem]:
        data = self.data
        yield from check_weights("data.pretrained_weights", data.pretrained_weights)
        if data.adapter is not None:
            yield from check_adapter("data.adapter", data.adapter)
        if data.tokenizer is not None:
            yield from check_tokenizer("data.tokenizer", data.tokenizer)
        for field in data.row_keys:
            value = getattr(data, field)
            if value is not None:
                yield from check_rows(f"data.{field}", value, self.example_row(value))
        if data.chat_template not in ("auto", "plain") and not os.path.isfile(data.chat_template.replace("\0", "")):
            expected = '"auto", "plain" or a file with a Jinja template'
            yield Problem(("data.chat_template",), f'"{data.chat_template}", which does not exist', expected)
        yield from check_output_folder("data.output_dir", data.output_dir)
        if os.path.isdir(data.pretrained_weights) and checks.same_path(data.pretrained_weights, data.output_dir):
            fields = ("data.output_dir", "data.pretrained_weights")
            yield Problem(fields, f'"{data.output_dir}", the folder of the pretrained weights', "another folder")

    def effects(self) -> dict[str, tuple[bool, str]]:
        """Keys that may have no effect → whether they have one, and the reason if not."""
        data = self.data
        return {
            **checks.effects(self.training),
            "training.head_learning_rate": (False, "a language model has no separate head"),
            "data.validation_share": (data.validation_data is None, "validation_data is set"),
            "data.max_dropped_share": (data.over_length == "drop", f"over_length is {data.over_length}"),
            "evaluation.every": (
                self.generates or (self.validates and self.evaluation.samples > 0),
                "no answers are generated",
            ),
        }

    def notes(self) -> list[str]:
        data, training, source = self.data, self.training, getattr(self.data, self.data.source_key)
        notes = checks.without_effect(self, self.effects()) + rate_notes(self)
        if training.save_every == "validation" and not self.validates:
            notes.append(
                "training.save_every is validation, but nothing is validated: checkpoints follow save_interval"
            )
        if data.validation_data is not None and source and checks.same_path(data.validation_data, source):
            notes.append("data.validation_data is the training data: validation scores rows of the training set")
        return notes
