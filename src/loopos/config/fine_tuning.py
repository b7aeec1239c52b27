"""The config of fine-tuning: its four sections, and what they must not contradict.

Enters: the sections, each valid by itself. Leaves: `FineTuningConfig`, and `Finding`s for contradictions between keys
and for missing files. Left out: what only the data or the weights can tell (class counts, true sizes).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from loopos.config.faults import Finding
from loopos.config.paths import (
    NEW_WEIGHTS,
    check_output_folder,
    check_rows,
    check_tokenizer,
    check_weights,
    is_bare_weights,
)
from loopos.config.sections import (
    METRICS,
    ComputationSection,
    DataSection,
    MethodConfig,
    Metric,
    ModelSection,
    TrainingSection,
)

EXAMPLE_ROW = '{"text": "the parcel came late", "label": "complaint"}'
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "vocab_size")


class FineTuningConfig(MethodConfig):
    """Everything that a fine-tuning run is told."""

    description: str = Field(default="", description="free text, for people")
    model: ModelSection = Field(default_factory=ModelSection, description="the model's sizes and its head")
    computation: ComputationSection = Field(description="which method runs")
    training: TrainingSection = Field(description="how the weights are trained")
    data: DataSection = Field(description="where weights and rows come from, and where the run goes")

    @property
    def has_validation(self) -> bool:
        """Whether any rows are kept for validation."""
        data = self.data
        return data.validation_data is not None or data.validation_split is not None or data.validation_share > 0

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.has_validation and self.training.validate_every != "never"

    def check(self) -> Iterator[Finding]:
        yield from _check_sizes(self)
        yield from _check_classes(self.model)
        yield from _check_task(self.model)
        yield from _check_trainable(self)
        yield from _check_steps(self.training)
        yield from _check_optimizer(self.training)
        yield from _check_validation(self)
        yield from _check_metrics(self)
        yield from _check_data(self.data)

    def check_files(self) -> Iterator[Finding]:
        data = self.data
        yield from check_weights("data.pretrained_weights", data.pretrained_weights)
        if data.tokenizer is not None:
            yield from check_tokenizer("data.tokenizer", data.tokenizer)
        yield from check_rows("data.training_data", data.training_data, EXAMPLE_ROW)
        if data.validation_data is not None:
            yield from check_rows("data.validation_data", data.validation_data, EXAMPLE_ROW)
        yield from check_output_folder("data.output_dir", data.output_dir)
        if os.path.isdir(data.pretrained_weights) and _same_path(data.pretrained_weights, data.output_dir):
            fields = ("data.output_dir", "data.pretrained_weights")
            yield Finding(fields, f'"{data.output_dir}", the folder of the pretrained weights', "another folder")

    def notes(self) -> list[str]:
        model, training, data = self.model, self.training, self.data
        is_huber, schedule, optimizer = model.regression_loss == "huber", training.schedule, training.optimizer
        has_effect = {
            "training.num_workers": (False, "rows are read by the training process itself"),
            "training.prefetch_batches": (False, "rows are read by the training process itself"),
            "training.lora": (training.trainable == "lora", f"trainable is {training.trainable}"),
            "training.betas": (optimizer in ("adam", "adamw", "muon"), f"the optimizer is {optimizer}"),
            "training.num_cycles": (schedule == "cosine_restarts", f"the schedule is {schedule}"),
            "training.decay_share": (schedule == "warmup_stable_decay", f"the schedule is {schedule}"),
            "training.minimum_ratio": (schedule not in ("constant", "inverse_sqrt"), f"the schedule is {schedule}"),
            "training.plateau_factor": (schedule == "plateau", f"the schedule is {schedule}"),
            "training.plateau_patience": (schedule == "plateau", f"the schedule is {schedule}"),
            "model.huber_delta": (is_huber, f"regression_loss is {model.regression_loss}"),
            "data.validation_share": (data.validation_data is None, "validation_data is given"),
        }
        said: list[str] = []
        for field, (effective, reason) in has_effect.items():
            section, key = field.split(".")
            values = getattr(self, section)
            if not effective and getattr(values, key) != type(values).model_fields[key].default:
                said.append(f"{field} has no effect: {reason}")
        if training.save_every == "validation" and not self.validates:
            said.append("training.save_every is validation, and nothing is validated: checkpoints at the end alone")
        if data.validation_data is not None and _same_path(data.validation_data, data.training_data):
            said.append("data.validation_data is data.training_data: validation will score rows that were trained on")
        return said


def _same_path(one: str, other: str) -> bool:
    return os.path.realpath(one.replace("\0", "")) == os.path.realpath(other.replace("\0", ""))


def _check_sizes(config: FineTuningConfig) -> Iterator[Finding]:
    model, weights = config.model, config.data.pretrained_weights
    heads, key_heads = model.num_heads, model.num_key_value_heads
    fields: tuple[str, ...]
    if model.d_model is not None and heads is not None and model.d_model % heads:
        wanted = f"a multiple of num_heads ({heads})"
        lower = model.d_model // heads * heads
        hint = f"write {lower} or {lower + heads}" if lower else f"write {heads}"
        yield Finding(("model.d_model", "model.num_heads"), str(model.d_model), wanted, hint)
    elif weights == NEW_WEIGHTS and model.d_model is not None and heads is not None and model.d_model // heads % 2:
        given = f"{model.d_model}, which gives each of {heads} heads {model.d_model // heads} features"
        yield Finding(
            ("model.d_model", "model.num_heads"), given, "an even number a head (rotary positions turn pairs)"
        )
    if heads is not None and key_heads is not None and heads % key_heads:
        fields = ("model.num_key_value_heads", "model.num_heads")
        yield Finding(fields, str(key_heads), f"a divisor of num_heads ({heads})")
    missing = [name for name in SIZES if getattr(model, name) is None]
    if missing and (weights == NEW_WEIGHTS or is_bare_weights(weights)):
        given = f'no {", ".join(missing)} with "{weights}"'
        fields = ("model", "data.pretrained_weights", *(f"model.{name}" for name in missing))
        yield Finding(fields, given, f"all of {', '.join(SIZES)}", "these weights come without their sizes")
    if weights == NEW_WEIGHTS and config.data.tokenizer is None:
        hint = 'for example "tokenizer": "smollm2-135m"'
        yield Finding(("data.tokenizer", "data.pretrained_weights"), 'nothing with "new" weights', "a tokenizer", hint)


def _check_classes(model: ModelSection) -> Iterator[Finding]:
    labels, weights, num_classes = model.labels, model.class_weights, model.num_classes
    if labels is not None:
        repeated = [label for label, count in Counter(labels).items() if count > 1]
        if repeated:
            yield Finding(("model.labels",), f'"{repeated[0]}" more than once', "each class name once")
        if num_classes is not None and len(labels) != num_classes:
            given = f"{len(labels)} names for num_classes {num_classes}"
            yield Finding(("model.labels", "model.num_classes"), given, "as many names as classes")
        elif len(labels) < 2 and model.task != "regression":
            yield Finding(("model.labels", "model.task"), "1 name", "at least 2 classes")
    known = num_classes if num_classes is not None else len(labels) if labels is not None else None
    if isinstance(weights, list) and known is not None and len(weights) != known:
        fields = ("model.class_weights", "model.num_classes", "model.labels")
        yield Finding(fields, f"{len(weights)} weights for {known} classes", "one weight a class")


def _check_task(model: ModelSection) -> Iterator[Finding]:
    """Keys of one task that are given with another; with no task given, the labels will tell."""
    task = model.task
    if task == "regression" and model.num_classes not in (None, 1):
        hint = "leave num_classes out for regression"
        yield Finding(
            ("model.num_classes", "model.task"), f"{model.num_classes} with task regression", "1, or nothing", hint
        )
    if task in ("classification", "multi_label") and model.num_classes == 1:
        yield Finding(("model.num_classes", "model.task"), f"1 with task {task}", "at least 2")
    if task == "regression" and model.labels is not None:
        yield Finding(("model.labels", "model.task"), "class names with task regression", "no class names")
    if task in ("multi_label", "regression"):
        if model.class_weights is not None:
            fields = ("model.class_weights", "model.task")
            yield Finding(fields, f"class weights with task {task}", "null", "class weights are for classification")
        if model.label_smoothing > 0:
            fields = ("model.label_smoothing", "model.task")
            given = f"{model.label_smoothing} with task {task}"
            yield Finding(fields, given, "0", "label smoothing is for classification")
    if task in ("classification", "multi_label") and model.regression_loss == "huber":
        yield Finding(
            ("model.regression_loss", "model.task"), f'"huber" with task {task}', "task regression, or no such key"
        )


def _check_trainable(config: FineTuningConfig) -> Iterator[Finding]:
    training, num_layers = config.training, config.model.num_layers
    frozen, trainable, unfreeze = training.freeze_layers, training.trainable, training.unfreeze_step
    if trainable in ("head", "lora") and frozen > 0:
        fields = ("training.freeze_layers", "training.trainable")
        given = f"{frozen} with trainable {trainable}"
        yield Finding(fields, given, "0, or trainable all", f"{trainable} already freezes every pretrained weight")
    if trainable == "head" and training.lora is not None:
        fields = ("training.lora", "training.trainable")
        yield Finding(fields, "adapters with trainable head", 'no lora section, or "trainable": "lora"')
    if num_layers is not None and frozen > num_layers:
        given = f"{frozen} of {num_layers} layers"
        yield Finding(("training.freeze_layers", "model.num_layers"), given, f"at most num_layers ({num_layers})")
    if unfreeze is not None and frozen == 0:
        fields = ("training.unfreeze_step", "training.freeze_layers")
        yield Finding(fields, f"{unfreeze} with freeze_layers 0", "freeze_layers of at least 1, or null")
    if unfreeze is not None and training.max_steps is not None and unfreeze >= training.max_steps:
        fields = ("training.unfreeze_step", "training.max_steps")
        yield Finding(fields, str(unfreeze), f"a step before max_steps ({training.max_steps})")


def _check_steps(training: TrainingSection) -> Iterator[Finding]:
    warmup, max_steps = training.warmup, training.max_steps
    fields: tuple[str, ...]
    if isinstance(warmup, int) and max_steps is not None and warmup >= max_steps:
        fields = ("training.warmup", "training.max_steps")
        yield Finding(
            fields, f"{warmup} steps", f"fewer than max_steps ({max_steps})", "or a share of all steps, such as 0.1"
        )
    if training.schedule == "warmup_stable_decay" and isinstance(warmup, float) and warmup + training.decay_share > 1:
        fields = ("training.warmup", "training.decay_share", "training.schedule")
        given = f"a warmup of {warmup} and a decay of {training.decay_share}"
        yield Finding(fields, given, "shares that sum to at most 1")
    if training.schedule == "cosine_restarts" and max_steps is not None and training.num_cycles > max_steps:
        fields = ("training.num_cycles", "training.max_steps", "training.schedule")
        yield Finding(fields, str(training.num_cycles), f"at most max_steps ({max_steps})")


def _check_optimizer(training: TrainingSection) -> Iterator[Finding]:
    if training.momentum > 0 and training.optimizer not in ("sgd", "muon"):
        fields = ("training.momentum", "training.optimizer")
        given = f"{training.momentum} with optimizer {training.optimizer}"
        hint = "" if training.optimizer == "adafactor" else "its first decay is betas[0]"
        yield Finding(fields, given, "0, or optimizer sgd or muon", hint)
    if training.precision == "fp16" and training.device in ("cpu", "mps"):
        fields = ("training.precision", "training.device")
        yield Finding(fields, f"fp16 with device {training.device}", "auto, fp32 or bf16", "fp16 is for CUDA alone")


def _check_validation(config: FineTuningConfig) -> Iterator[Finding]:
    training = config.training
    cause: tuple[str, ...]
    if config.validates:
        return
    if config.has_validation:
        reason, cause = 'validate_every "never"', ("training.validate_every",)
    else:
        reason = "no validation rows"
        cause = ("data.validation_share", "data.validation_data", "data.validation_split")
    wanted = "validation rows (validation_data or validation_share) and validate_every"
    if training.early_stopping is not None:
        yield Finding(("training.early_stopping", *cause), f"early stopping with {reason}", wanted)
    if training.schedule == "plateau":
        yield Finding(("training.schedule", *cause), f'"plateau" with {reason}', f"{wanted}, or another schedule")


def _check_metrics(config: FineTuningConfig) -> Iterator[Finding]:
    task, stopping = config.model.task, config.training.early_stopping
    named: dict[str, Metric | None] = {"training.metric": config.training.metric}
    if stopping is not None:
        named["training.early_stopping.metric"] = stopping.metric
    for field, metric in named.items():
        if task is not None and metric is not None and metric not in METRICS[task]:
            allowed = ", ".join(METRICS[task])
            yield Finding((field, "model.task"), f'"{metric}" with task {task}', f"one of {allowed}")


def _check_data(data: DataSection) -> Iterator[Finding]:
    if data.streaming and data.max_rows is None:
        fields = ("data.streaming", "data.max_rows")
        yield Finding(fields, "true, with no end", "data.max_rows with it", "a stream does not tell its length")
    roles: dict[str, str] = {}
    for role, column in data.columns.items():
        if column in roles:
            given = f'"{column}", which is {roles[column]} already'
            yield Finding((f"data.columns.{role}",), given, "a column for one role")
        roles[column] = role
