"""The config of chain-of-thought training (`ChainOfThoughtConfig`) and the checks across its keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema

from loopos.config import checks
from loopos.config.diagnostics import Problem
from loopos.config.keys import BUILT_IN_METRICS, EXAMPLES, STRATEGY, Count, Location, Section, Strategy, Text
from loopos.config.paths import check_output_folder, check_rows, check_tokenizer, check_weights
from loopos.config.sections import (
    LANGUAGE_METRICS,
    ComputationSection,
    DistributedSection,
    LanguageModelSection,
    LanguageTrainingSection,
    MethodConfig,
    TextSourceSection,
    check_distributed,
)

EXAMPLE_ROW = '{"problem": "What is 17 + 26?", "reasoning": ["7 + 6 = 13, carry 1", "1 + 2 + 1 = 4"], "answer": "43"}'
EXAMPLE_LINES = ", or lines: Problem: What is 17 + 26? / 7 + 6 = 13, carry 1 / 1 + 2 + 1 = 4 / Answer: 43"
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

_CHECKER = re.compile(r"auto|exact|numeric|choice|math_verify|reasoning_gym|[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _matching(pattern: re.Pattern[str]) -> AfterValidator:
    def matched(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError("does not match the pattern")
        return value

    return AfterValidator(matched)


def _written_as(pattern: re.Pattern[str], examples: list[str]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern.pattern})$", "examples": examples})


StrategyName: TypeAlias = Annotated[str, _matching(STRATEGY), _written_as(STRATEGY, list(EXAMPLES))]
Checker: TypeAlias = Annotated[
    str,
    _matching(_CHECKER),
    _written_as(_CHECKER, ["auto", "exact", "numeric", "choice", "math_verify", "reasoning_gym", "module:function"]),
]


class StepFormatSection(Section):
    r"""How reasoning is written: opening, each step and the delimiter, closing, the marker, the answer."""

    opening: str = Field(default="<think>\n", description="text before the first step")
    closing: str = Field(default="</think>\n", description="text behind the last step's delimiter")
    delimiter: Text = Field(default="\n", description="text that ends each step")
    answer_marker: str = Field(default="", description="text before the answer")


class ReasoningDataSection(TextSourceSection):
    """Where the weights and the demonstrations come from, how they are read, and where the run goes."""

    source_keys: ClassVar[tuple[str, ...]] = ("reasoning_examples", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("reasoning_examples", "training_data", "validation_data")

    pretrained_weights: Location = Field(
        description='"smollm2-135m", "new", a folder, a .gguf, .safetensors or .bin file, or a hub id "org/name"'
    )
    tokenizer: Location | None = Field(
        default=None, description="folder, file or hub id of the tokenizer; the weights' own when absent"
    )
    reasoning_examples: Location | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the demonstrations to train on'
    )
    training_data: Location | None = Field(default=None, description="another name of reasoning_examples")
    columns: dict[TextRole, Text | None] = Field(
        default={}, description="column of each role; detected when absent, null for none"
    )
    chat_template: Location = Field(
        default="auto",
        description='"auto" (the tokenizer\'s own, else plain), "plain", or a file with a Jinja template',
    )
    step_format: Literal["think", "hashes", "lines"] | StepFormatSection = Field(
        default="think", description="how steps and answer are written"
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
    def source(self) -> str:
        """The rows to train on, under either of the two keys."""
        found = self.reasoning_examples or self.training_data
        assert found is not None, "checked by ChainOfThoughtConfig.check"
        return found


class ReasoningGenerationSection(Section):
    """How chains are generated for validation and samples."""

    max_new_tokens: Count = Field(default=256, description="longest reasoning and answer together (tokens)")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="divisor of the logits; 0 is greedy decoding"
    )
    top_k: Count | None = Field(default=None, description="sample from the k most likely tokens; null is all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the smallest set of tokens with this total probability"
    )
    strategy: StrategyName = Field(default="single", description="how an answer is selected from chains")
    max_reasoning_steps: Count | None = Field(default=None, description="steps after which the answer is forced")
    max_step_tokens: Count | None = Field(default=None, description="longest step (tokens)")
    min_thinking_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0, description="tokens of reasoning before it may end"
    )
    max_thinking_tokens: Count | None = Field(
        default=None, description="tokens of reasoning after which its end is forced"
    )

    @property
    def chains(self) -> int:
        """Chains that `strategy` samples per problem; for step_beam, beams × candidates."""
        return Strategy.parse(self.strategy).chains


class AnswerEvaluationSection(Section):
    """How answers are generated and checked while training."""

    problems: Annotated[int, Field(ge=0)] = Field(
        default=64, description="validation problems to answer; 0 measures only the loss"
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="validation conversations or prompts answered as samples for the report; 0 is none",
    )
    every: Count = Field(default=1, description="generate answers in every n-th validation")
    checker: Checker = Field(default="auto", description="function that checks answers")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        default=1e-6, description="relative error at which a number counts as right"
    )


class SelfImprovementSection(Section):
    """Rounds of training on chains that the model itself found (Zelikman et al. 2022)."""

    rounds: Count = Field(description="rounds of sampling, filtering and training")
    samples_per_problem: Count = Field(default=4, description="chains sampled for each problem in a round")
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="divisor of the logits when sampling")
    rationalise: bool = Field(
        default=False, description="sample again with the answer as a hint where every chain was wrong"
    )


class ChainOfThoughtConfig(MethodConfig):
    """Config of a chain-of-thought run."""

    description: str = Field(default="", description="free text")
    model: LanguageModelSection = Field(default_factory=LanguageModelSection, description="the model's sizes")
    computation: ComputationSection = Field(description="the method")
    training: LanguageTrainingSection = Field(description="optimizer, schedule and checkpoints")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="how the run is distributed over processes"
    )
    data: ReasoningDataSection = Field(description="weights, rows and output folder")
    generation: ReasoningGenerationSection = Field(
        default_factory=ReasoningGenerationSection, description="how chains are generated"
    )
    evaluation: AnswerEvaluationSection = Field(
        default_factory=AnswerEvaluationSection, description="how answers are checked"
    )
    self_improvement: SelfImprovementSection | None = Field(
        default=None, description="training on the model's own correct chains; null is none"
    )

    @property
    def validates(self) -> bool:
        """Whether validation ever runs."""
        return self.data.has_validation and self.training.validate_every != "never"

    @property
    def generates(self) -> bool:
        """Whether validation generates and checks answers."""
        return self.validates and self.evaluation.problems > 0

    def check(self) -> Iterator[Problem]:
        model, training, data = self.model, self.training, self.data
        yield from checks.check_weights_and_sizes(model, data.pretrained_weights, data.tokenizer)
        yield from checks.check_trainable(training, model.num_layers)
        yield from checks.check_steps(training)
        yield from checks.check_optimizer(training)
        yield from check_distributed(self.distributed, training.optimizer)
        yield from checks.check_validation(training, has_validation=data.has_validation)
        yield from checks.check_source(
            {"reasoning_examples": data.reasoning_examples, "training_data": data.training_data}
        )
        yield from checks.check_reading(
            streaming=data.streaming, max_rows=data.max_rows, columns=data.columns.items(), encoding=data.encoding
        )
        yield from checks.check_no_head(training)
        yield from _check_step_format(data)
        yield from _check_metrics(self)
        yield from _check_generation(self.generation)

    def check_files(self) -> Iterator[Problem]:
        data = self.data
        yield from check_weights("data.pretrained_weights", data.pretrained_weights)
        if data.tokenizer is not None:
            yield from check_tokenizer("data.tokenizer", data.tokenizer)
        for field in ("reasoning_examples", "training_data", "validation_data"):
            value = getattr(data, field)
            if value is not None:
                is_text = value.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")
                yield from check_rows(f"data.{field}", value, EXAMPLE_ROW + (EXAMPLE_LINES if is_text else ""))
        if data.chat_template not in ("auto", "plain") and not os.path.isfile(data.chat_template.replace("\0", "")):
            expected = '"auto", "plain" or a file with a Jinja template'
            yield Problem(("data.chat_template",), f'"{data.chat_template}", which does not exist', expected)
        yield from check_output_folder("data.output_dir", data.output_dir)
        if os.path.isdir(data.pretrained_weights) and checks.same_path(data.pretrained_weights, data.output_dir):
            fields = ("data.output_dir", "data.pretrained_weights")
            yield Problem(fields, f'"{data.output_dir}", the folder of the pretrained weights', "another folder")

    def notes(self) -> list[str]:
        data, training, source = self.data, self.training, self.data.reasoning_examples or self.data.training_data
        has_effect = {
            **checks.effects(training),
            "training.head_learning_rate": (False, "a language model has no separate head"),
            "data.validation_share": (data.validation_data is None, "validation_data is set"),
            "data.max_dropped_share": (data.over_length == "drop", f"over_length is {data.over_length}"),
            "evaluation.every": (
                self.generates or (self.validates and self.evaluation.samples > 0),
                "no answers are generated",
            ),
            "evaluation.checker": (
                self.generates or self.self_improvement is not None,
                "no answers are generated",
            ),
        }
        notes = checks.without_effect(self, has_effect) + checks.rate_notes(training)
        if training.save_every == "validation" and not self.validates:
            notes.append(
                "training.save_every is validation, but nothing is validated: checkpoints follow save_interval"
            )
        if data.validation_data is not None and source and checks.same_path(data.validation_data, source):
            notes.append("data.validation_data is the training data: validation scores rows of the training set")
        return notes


def _check_step_format(data: ReasoningDataSection) -> Iterator[Problem]:
    if not isinstance(data.step_format, StepFormatSection):
        return
    for name in ("closing", "answer_marker"):
        value = getattr(data.step_format, name)
        if value and not value.strip():
            yield Problem((f"data.step_format.{name}",), "only white space", "visible text, or nothing")


def _check_metrics(config: ChainOfThoughtConfig) -> Iterator[Problem]:
    training, stopping = config.training, config.training.early_stopping
    always = config.evaluation.problems > 0 and config.evaluation.every == 1
    named = {"training.metric": training.metric}
    if stopping is not None:
        named["training.early_stopping.metric"] = stopping.metric
    for field, metric in named.items():
        if metric in BUILT_IN_METRICS - set(LANGUAGE_METRICS):
            yield Problem((field,), f'"{metric}"', f"one of {', '.join(LANGUAGE_METRICS)}")
        elif metric == "accuracy" and config.validates and not always:
            actual = '"accuracy", which is not part of every validation'
            expected = '"loss", or evaluation.problems of at least 1 and evaluation.every 1'
            yield Problem((field, "evaluation.problems", "evaluation.every"), actual, expected)


def _check_generation(generation: ReasoningGenerationSection) -> Iterator[Problem]:
    if generation.chains > 1 and generation.temperature == 0:
        fields = ("generation.strategy", "generation.temperature")
        actual = f'"{generation.strategy}" with temperature 0'
        yield Problem(fields, actual, "a temperature > 0, such as 0.7", "at temperature 0 all chains are the same")
    least, most = generation.min_thinking_tokens, generation.max_thinking_tokens
    if most is not None and least > most:
        fields = ("generation.min_thinking_tokens", "generation.max_thinking_tokens")
        yield Problem(fields, str(least), f"at most max_thinking_tokens ({most})")
    if most is not None and most >= generation.max_new_tokens:
        fields = ("generation.max_thinking_tokens", "generation.max_new_tokens")
        yield Problem(fields, str(most), f"fewer than max_new_tokens ({generation.max_new_tokens})")
