"""The config of fine-tuning a model with a head (`FineTuningConfig`) and the checks across its keys."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import BUILT_IN_METRICS, METRICS, Metric
from loopos.config.learning_rates import rate_notes
from loopos.config.paths import (
    check_adapter,
    check_output_folder,
    check_rows,
    check_tokenizer,
    check_weights,
)
from loopos.config.registry import choices
from loopos.config.sections import (
    ComputationSection,
    DataSection,
    DistributedSection,
    MethodConfig,
    ModelSection,
    TrainingSection,
    check_distributed,
)
from loopos.config.variants import LOSSES

EXAMPLE_ROW = '{"text": "the parcel came late", "label": "complaint"}'


class FineTuningConfig(MethodConfig):
    """Config of a fine-tuning run."""

    description: str = Field(default="", description="free text")
    model: ModelSection = Field(default_factory=ModelSection, description="the model's sizes and its head")
    computation: ComputationSection = Field(description="the method")
    training: TrainingSection = Field(description="optimizer, schedule and checkpoints")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: DataSection = Field(description="weights, rows and output folder")

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows."""
        data = self.data
        return data.validation_data is not None or data.validation_split is not None or data.validation_share > 0

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.has_validation and self.training.validate_every != "never"

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from _check_classes(model)
        yield from _check_task(model)
        yield from checks.check_trainable(training, model.num_layers, data.adapter)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=self.has_validation)
        yield from _check_metrics(self)
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )

    def check_files(self) -> Iterator[Problem]:
        data = self.data
        yield from check_weights("data.pretrained_weights", data.pretrained_weights)
        if data.adapter is not None:
            yield from check_adapter("data.adapter", data.adapter)
        if data.tokenizer is not None:
            yield from check_tokenizer("data.tokenizer", data.tokenizer)
        yield from check_rows("data.training_data", data.training_data, EXAMPLE_ROW)
        if data.validation_data is not None:
            yield from check_rows("data.validation_data", data.validation_data, EXAMPLE_ROW)
        yield from check_output_folder("data.output_dir", data.output_dir)
        if os.path.isdir(data.pretrained_weights) and checks.same_path(data.pretrained_weights, data.output_dir):
            fields = ("data.output_dir", "data.pretrained_weights")
            yield Problem(fields, f'"{data.output_dir}", the folder of the pretrained weights', "another folder")

    def notes(self) -> list[str]:
        model, training, data = self.model, self.training, self.data
        has_effect = {
            **checks.effects(training),
            "model.huber_delta": (
                model.loss is not None or model.regression_loss == "huber",
                f"regression_loss is {model.regression_loss}",
            ),
            "model.regression_loss": (model.loss is None, "model.loss is set"),
            "model.target_scaling": (model.task in (None, "regression"), f"the task is {model.task}"),
            "data.validation_share": (data.validation_data is None, "validation_data is set"),
        }
        notes = checks.without_effect(self, has_effect) + rate_notes(self, has_head=True)
        if training.save_every == "validation" and not self.validates:
            notes.append(
                "training.save_every is validation, but nothing is validated: checkpoints follow save_interval"
            )
        if training.trainable == "lora" and training.optimizer == "sgd" and training.learning_rate < 0.01:
            notes.append(
                f"training.optimizer is sgd, which at a rate of {training.learning_rate:g} hardly changes adapters; "
                'use "adamw", or a rate about 100 times as large'
            )
        if data.validation_data is not None and checks.same_path(data.validation_data, data.training_data):
            notes.append("data.validation_data is data.training_data: validation scores rows of the training set")
        return notes


def _check_classes(model: ModelSection) -> Iterator[Problem]:
    labels, weights, num_classes = model.labels, model.class_weights, model.num_classes
    if labels is not None:
        repeated = [label for label, count in Counter(labels).items() if count > 1]
        if repeated:
            yield Problem(("model.labels",), f'"{repeated[0]}" more than once', "each class name once")
        if num_classes is not None and len(labels) != num_classes:
            actual = f"{len(labels)} names for num_classes {num_classes}"
            yield Problem(("model.labels", "model.num_classes"), actual, "as many names as classes")
        elif len(labels) < 2 and model.task != "regression":
            yield Problem(("model.labels", "model.task"), "1 name", "at least 2 classes")
    known = num_classes if num_classes is not None else len(labels) if labels is not None else None
    if isinstance(weights, list) and known is not None and len(weights) != known:
        fields = ("model.class_weights", "model.num_classes", "model.labels")
        yield Problem(fields, f"{len(weights)} weights for {known} classes", "one weight per class")


def _check_task(model: ModelSection) -> Iterator[Problem]:
    """Check keys against the task; without a task in the config, it is taken from the labels later."""
    task = model.task
    if task == "regression" and model.num_classes not in (None, 1):
        hint = "leave num_classes out for regression"
        yield Problem(
            ("model.num_classes", "model.task"), f"{model.num_classes} with task regression", "1, or nothing", hint
        )
    if task in ("classification", "multi_label") and model.num_classes == 1:
        yield Problem(("model.num_classes", "model.task"), f"1 with task {task}", "at least 2")
    if task == "regression" and model.labels is not None:
        yield Problem(("model.labels", "model.task"), "class names with task regression", "no class names")
    if task in ("multi_label", "regression"):
        if model.class_weights is not None:
            fields = ("model.class_weights", "model.task")
            yield Problem(fields, f"class weights with task {task}", "null", "class weights are for classification")
        if model.label_smoothing > 0:
            fields = ("model.label_smoothing", "model.task")
            actual = f"{model.label_smoothing} with task {task}"
            yield Problem(fields, actual, "0", "label smoothing is for classification")
    if model.loss is not None:
        yield from _check_loss(model.loss, task)
    if task in ("classification", "multi_label") and model.regression_loss == "huber":
        yield Problem(
            ("model.regression_loss", "model.task"), f'"huber" with task {task}', "task regression, or no such key"
        )


def _check_loss(name: str, task: str | None) -> Iterator[Problem]:
    problems = list(checks.check_loss("model.loss", name, "fine_tuning"))
    yield from problems
    if not problems and task is not None and task not in LOSSES[name].tasks:
        fitting = [each for each in LOSSES if task in LOSSES[each].tasks]
        yield Problem(("model.loss", "model.task"), f'"{name}" with task {task}', choices(fitting))


def _check_metrics(config: FineTuningConfig) -> Iterator[Problem]:
    task, stopping = config.model.task, config.training.early_stopping
    named: dict[str, Metric | None] = {"training.metric": config.training.metric}
    if stopping is not None:
        named["training.early_stopping.metric"] = stopping.metric
    for field, metric in named.items():
        if task is not None and metric in BUILT_IN_METRICS - set(METRICS[task]):
            allowed = ", ".join(METRICS[task])
            yield Problem((field, "model.task"), f'"{metric}" with task {task}', f"one of {allowed}")
