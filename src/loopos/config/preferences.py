"""Config sections and checks that reward_model, ppo and rlhf share.

They cover the sources of preference rows and prompts, the loss of a reward model, and the check that a folder contains
a reward model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import Count, Location, Section, Text, VariantName
from loopos.config.paths import (
    MODEL_DESCRIPTION,
    check_adapter,
    check_output_folder,
    check_rows,
    check_tokenizer,
    check_weights,
)
from loopos.config.sections import StepFormatName, StepFormatSection, TextSourceSection, TrainingSection
from loopos.config.source import close_files
from loopos.config.variants import LOSSES

REWARD_TASK = "reward"
"""The task in the description file of a reward model."""

CHAT_TEMPLATES = ("auto", "plain", "none")
"""The values of `data.chat_template` that are not files."""

PreferenceRole: TypeAlias = Literal[
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "ranking",
    "margin",
    "p_human",
    "tie",
    "response_1",
    "response_2",
    "preference",
    "system",
    "tools",
    "input",
    "context",
    "choices",
    "history",
]


STEP_ROLES = frozenset({"completions", "labels"})
"""Roles of rows with step labels, which only a reward model reads."""


class PreferenceTextSection(TextSourceSection):
    """Where the weights come from, how rows of preferences or prompts become text, and where the run goes."""

    pretrained_weights: Location = Field(
        description='"smollm2-135m", "new", a folder, a .gguf, .safetensors or .bin file, or a hub id "org/name"'
    )
    adapter: Location | None = Field(
        default=None, description="PEFT adapter over the weights, or a run with one, that trains on (trainable: lora)"
    )
    tokenizer: Location | None = Field(
        default=None, description="folder, file or hub id of the tokenizer; the weights' own when absent"
    )
    columns: dict[PreferenceRole, Text | None] = Field(
        default={}, description="column of each role; detected when absent, null for none"
    )
    chat_template: Location = Field(
        default="auto",
        description='"auto" (the tokenizer\'s own, else plain), "plain", "none" (strings stay as they are), or a file '
        "with a Jinja template",
    )
    over_length: Literal["drop", "cut", "cut_prompt", "error"] = Field(
        default="drop",
        description="what happens to a row over max_length; cut removes the responses' end, with the end token, "
        "cut_prompt the prompt's start, behind the begin token and the system's message",
    )
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="largest fraction of rows that drop may remove"
    )


Aggregation: TypeAlias = Literal["product", "min", "last"]
"""How the score of a response follows from the probabilities of its steps: their product (Lightman et al. 2023), the
smallest (Wang et al. 2024, Math-Shepherd), or the last (Snell et al. 2024).
"""


class ProcessSection(Section):
    """How a process reward model reads the steps of a response, and what makes their scores one."""

    step_separator: Text = Field(default="\n", description="text behind each step; its last token scores the step")
    aggregation: Aggregation = Field(
        default="product", description="score of a response: product, minimum or last of its steps' probabilities"
    )
    step_format: StepFormatName | StepFormatSection | None = Field(
        default=None, description="step format of the texts to score; null splits them at step_separator"
    )
    answer_is_step: bool = Field(
        default=True, description="score the answer behind the steps of a chain as its last step"
    )


class RewardSection(Section):
    """What a reward model learns from a comparison (Christiano et al. 2017; Ouyang et al. 2022), or from step labels
    (Uesato et al. 2022; Lightman et al. 2023).
    """

    center_rewards: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="coefficient of the mean squared sum of a pair's two scores (per squared reward)"
    )
    loss: Annotated[str, VariantName(LOSSES, only=lambda row: "reward_model" in row.methods)] = Field(
        default="bradley_terry", description="loss of a pair of scores (`loopos list losses`)"
    )
    heads: Count = Field(default=1, description="scalar heads, an ensemble whose mean is the score")
    margins: bool = Field(default=False, description="subtract the rows' margins from the gap of the scores")
    soft_labels: bool = Field(
        default=True, description="use p_human, the fraction of people who preferred the chosen response, as the target"
    )
    normalize: bool = Field(
        default=True, description="normalize scores to mean 0, standard deviation 1 over training responses"
    )
    normalize_over: Count = Field(
        default=1024, description="training comparisons, drawn at random, whose responses give the mean and deviation"
    )
    process: ProcessSection = Field(
        default_factory=ProcessSection, description="how steps are read and scored, for rows with step labels"
    )


def check_text_files(data: PreferenceTextSection, examples: Mapping[str, tuple[str, str]]) -> Iterator[Problem]:
    """Check weights, tokenizer, rows, template and output folder.

    `examples` maps each key of `data` that names rows to an example row as JSON and as lines of a .txt file (empty if
    not supported).
    """
    yield from check_weights("data.pretrained_weights", data.pretrained_weights)
    if data.adapter is not None:
        yield from check_adapter("data.adapter", data.adapter)
    if data.tokenizer is not None:
        yield from check_tokenizer("data.tokenizer", data.tokenizer)
    for key, (row, lines) in examples.items():
        value = getattr(data, key)
        if value is not None:
            is_text = value.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")
            yield from check_rows(f"data.{key}", value, row + (lines if is_text else ""))
    if data.chat_template not in CHAT_TEMPLATES and not os.path.isfile(data.chat_template.replace("\0", "")):
        expected = '"auto", "plain", "none" or a file with a Jinja template'
        yield Problem(("data.chat_template",), f'"{data.chat_template}", which does not exist', expected)
    yield from check_output_folder("data.output_dir", data.output_dir)
    if os.path.isdir(data.pretrained_weights) and checks.same_path(data.pretrained_weights, data.output_dir):
        fields = ("data.output_dir", "data.pretrained_weights")
        yield Problem(fields, f'"{data.output_dir}", the folder of the pretrained weights', "another folder")


def check_reward_model(field: str, value: str) -> Iterator[Problem]:
    """Check the folder of a trained reward model: a run's `output_dir`, or its `model/`."""
    expected = "the output_dir of a finished reward_model run, or its folder model/"
    folder = value.replace("\0", "")
    files = [os.path.join(candidate, MODEL_DESCRIPTION) for candidate in (folder, os.path.join(folder, "model"))]
    file = next((each for each in files if os.path.isfile(each)), None)
    if not os.path.exists(folder):
        close = close_files(folder)
        hint = f'did you mean "{close[0]}"?' if close else 'train one first, with "method": "reward_model"'
        yield Problem((field,), f'"{value}", which does not exist', expected, hint)
    elif file is not None:
        actual = _other_model(file)
        if actual:
            yield Problem((field,), f'"{value}", {actual}', expected)
    elif os.path.isfile(os.path.join(folder, "events.jsonl")):
        hint = "finish it: loopos train CONFIG --resume"
        yield Problem((field,), f'"{value}", a run without a finished model', expected, hint)
    else:
        yield Problem((field,), f'"{value}", which contains no trained model', expected)


def _other_model(file: str) -> str:
    """Why a model's description is not that of a reward model; empty if it is."""
    try:
        with open(file, encoding="utf-8") as opened:
            description = json.load(opened)
    except (OSError, ValueError) as problem:
        return f"whose {MODEL_DESCRIPTION} cannot be read ({problem})"
    task = description.get("task") if isinstance(description, dict) else None
    if task == REWARD_TASK:
        return ""
    return f"a model of task {task}" if isinstance(task, str) else "a model without scores"


def text_effects(data: PreferenceTextSection) -> dict[str, tuple[bool, str]]:
    """Keys of `data` that may have no effect → whether they have one, and the reason if not."""
    return {
        "data.validation_share": (data.validation_data is None, "validation_data is set"),
        "data.max_dropped_share": (data.over_length == "drop", f"over_length is {data.over_length}"),
    }


def validation_notes(
    training: TrainingSection, data: PreferenceTextSection, source: str | None, *, validates: bool
) -> list[str]:
    """Notes on validation that never runs or that scores training rows; `source`: the training rows."""
    notes = []
    if training.save_every == "validation" and not validates:
        notes.append("training.save_every is validation, but nothing is validated: checkpoints follow save_interval")
    if data.validation_data is not None and source and checks.same_path(data.validation_data, source):
        notes.append("data.validation_data is the training data: validation scores rows of the training set")
    return notes
