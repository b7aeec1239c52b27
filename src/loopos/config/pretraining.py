"""The config of pretraining (`PretrainingConfig`) and the checks across its keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import Location, Text
from loopos.config.learning_rates import rate_notes
from loopos.config.paths import check_output_folder, check_rows, check_tokenizer
from loopos.config.sections import (
    ComputationSection,
    DistributedSection,
    LanguageModelSection,
    LanguageTrainingSection,
    MethodConfig,
    TextSourceSection,
    check_distributed,
)

EXAMPLE_ROW = '{"text": "Once there was a lighthouse keeper who could not sleep."}'
DEFAULT_WEIGHTS = "models/pretrained_model.bin"
# 256 bytes and the special tokens.
SMALLEST_VOCABULARY = 260
_WEIGHT_FILES = (".bin", ".safetensors")


class PretrainingDataSection(TextSourceSection):
    """Where the text comes from, where the run goes, and where the weights go."""

    source_keys: ClassVar[tuple[str, ...]] = ("input_file", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("input_file", "training_data", "validation_data")

    input_file: Location | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the text to train on'
    )
    training_data: Location | None = Field(default=None, description="another name of input_file")
    tokenizer: Location | None = Field(
        default=None,
        description="folder, file or hub id of a tokenizer; a tokenizer of vocab_size tokens is trained when absent",
    )
    columns: dict[Literal["text"], Text] = Field(default={}, description="column of the text; detected when absent")
    output_weights: Location = Field(
        default=DEFAULT_WEIGHTS,
        description="folder, or .bin or .safetensors file, of the trained weights; tokenizer and config go next to it",
    )

    @property
    def source(self) -> str:
        """The text to train on, under either of the two keys."""
        found = self.input_file or self.training_data
        assert found is not None, "checked by PretrainingConfig.check"
        return found

    @property
    def weights_folder(self) -> str:
        """The folder that the weights, their config and the tokenizer are written to."""
        if self.output_weights.lower().endswith(_WEIGHT_FILES):
            return os.path.dirname(self.output_weights) or "."
        return self.output_weights


class PretrainingConfig(MethodConfig):
    """Config of a pretraining run."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(description="the sizes of the new model")
    computation: ComputationSection = Field(description="the method")
    training: LanguageTrainingSection = Field(description="optimizer, schedule and checkpoints")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: PretrainingDataSection = Field(description="text, output folder and weights")

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never"

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        missing = [name for name in checks.SIZES if getattr(model, name) is None]
        if missing:
            fields = ("model", *(f"model.{name}" for name in missing))
            yield Problem(fields, f"no {', '.join(missing)}", f"all of {', '.join(checks.SIZES)}")
        yield from checks.check_sizes(model, is_new=True)
        if data.tokenizer is None and model.vocab_size is not None and model.vocab_size < SMALLEST_VOCABULARY:
            expected = f"at least {SMALLEST_VOCABULARY}: 256 bytes and the special tokens"
            yield Problem(("model.vocab_size", "data.tokenizer"), str(model.vocab_size), expected)
        yield from checks.check_trainable(training, model.num_layers)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_source({"input_file": data.input_file, "training_data": data.training_data})
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )
        yield from _check_new(self)

    def check_files(self) -> Iterator[Problem]:
        data = self.data
        for field in ("input_file", "training_data", "validation_data"):
            value = getattr(data, field)
            if value is not None:
                yield from check_rows(f"data.{field}", value, EXAMPLE_ROW)
        if data.tokenizer is not None:
            yield from check_tokenizer("data.tokenizer", data.tokenizer)
        yield from check_output_folder("data.output_dir", data.output_dir)
        yield from _check_output_weights(data)

    def notes(self) -> list[str]:
        data, training = self.data, self.training
        has_effect = {
            **checks.effects(training),
            "training.head_learning_rate": (False, "a language model has no separate head"),
            "data.validation_share": (data.validation_data is None, "validation_data is set"),
        }
        notes = checks.without_effect(self, has_effect) + rate_notes(self, "new model")
        if training.save_every == "validation" and not self.validates:
            notes.append(
                "training.save_every is validation, but nothing is validated: checkpoints follow save_interval"
            )
        return notes


def _check_new(config: PretrainingConfig) -> Iterator[Problem]:
    """Refuse keys that only make sense for pretrained weights."""
    training = config.training
    if training.trainable != "all":
        hint = "new weights must all be trained"
        yield Problem(("training.trainable",), f'"{training.trainable}"', '"all"', hint)
    if training.keep_zeros:
        yield Problem(("training.keep_zeros",), "true", "false", "new weights have no zeros to keep")
    if training.freeze_layers > 0:
        yield Problem(("training.freeze_layers",), str(training.freeze_layers), "0", "new weights must all be trained")
    stopping = training.early_stopping
    named = {"training.metric": training.metric}
    if stopping is not None:
        named["training.early_stopping.metric"] = stopping.metric
    for field, metric in named.items():
        if metric not in (None, "loss"):
            yield Problem((field,), f'"{metric}"', '"loss", or nothing')
    if training.max_length is not None and training.max_length < 2:
        yield Problem(("training.max_length",), str(training.max_length), "at least 2 tokens: one to predict another")


def _check_output_weights(data: PretrainingDataSection) -> Iterator[Problem]:
    value, field = data.output_weights, "data.output_weights"
    suffix = os.path.splitext(value)[1].lower()
    if suffix in (".pt", ".pth", ".gguf"):
        yield Problem((field,), f'"{value}"', f"a folder, or a file that ends in {' or '.join(_WEIGHT_FILES)}")
        return
    for problem in check_output_folder(field, data.weights_folder):
        yield Problem((field,), f'"{value}": {problem.actual}', "a folder that can be written to", problem.hint)
    is_file = suffix in _WEIGHT_FILES
    if "\0" not in value and is_file and os.path.isdir(value):
        yield Problem((field,), f'"{value}", a folder', "a file's name, or another folder")
    if checks.same_path(data.weights_folder, data.output_dir):
        fields = (field, "data.output_dir")
        yield Problem(
            fields, f'"{value}", in the folder of the run', "another folder", "the folder of a run holds only the run"
        )
