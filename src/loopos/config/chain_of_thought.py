"""The config of chain-of-thought training (`ChainOfThoughtConfig`): that of `sft`, and what reasoning in steps adds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema

from loopos.config.diagnostics import Problem
from loopos.config.keys import EXAMPLES, RANKED, STRATEGY, Count, Location, Section, Strategy
from loopos.config.preferences import check_reward_model
from loopos.config.sections import LANGUAGE_METRICS, StepFormatName, StepFormatSection
from loopos.config.sft import SftConfig, SftDataSection, SftEvaluationSection, SftGenerationSection

EXAMPLE_ROW = '{"problem": "What is 17 + 26?", "reasoning": ["7 + 6 = 13, carry 1", "1 + 2 + 1 = 4"], "answer": "43"}'
EXAMPLE_LINES = ", or lines: Problem: What is 17 + 26? / 7 + 6 = 13, carry 1 / 1 + 2 + 1 = 4 / Answer: 43"

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


class ReasoningDataSection(SftDataSection):
    """Where the weights and the demonstrations come from, how they are read, and where the run goes."""

    source_keys: ClassVar[tuple[str, ...]] = ("reasoning_examples", "training_data")
    row_keys: ClassVar[tuple[str, ...]] = ("reasoning_examples", "training_data", "validation_data")

    reasoning_examples: Location | None = Field(
        default=None, description='file, folder, glob or hub id "org/name" of the demonstrations to train on'
    )
    # Optional here: the rows have two names.
    training_data: Location | None = Field(  # type: ignore[assignment]
        default=None, description="another name of reasoning_examples"
    )
    step_format: StepFormatName | StepFormatSection = Field(
        default="think", description="how steps and answer are written"
    )


class ReasoningGenerationSection(SftGenerationSection):
    """How chains are generated for validation and samples."""

    max_new_tokens: Count = Field(default=256, description="longest reasoning and answer together (tokens)")
    strategy: StrategyName = Field(default="single", description="how an answer is selected from chains")
    reward_model: Location | None = Field(
        default=None,
        description="reward model that ranks the chains of best_of_n, or, scoring each step, those of step_beam; their "
        "log-probability when absent",
    )
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


class AnswerEvaluationSection(SftEvaluationSection):
    """How answers are generated and checked while training."""

    problems: Annotated[int, Field(ge=0)] = Field(
        default=64, description="validation problems to answer; 0 measures only the loss"
    )
    checker: Checker = Field(default="auto", description="function that checks answers")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        default=1e-6, description="relative error at which a number counts as right"
    )


class SelfImprovementSection(Section):
    """Rounds of training on chains that the model itself found (Zelikman et al. 2022)."""

    rounds: Count = Field(description="rounds of sampling, filtering and training")
    samples_per_problem: Count = Field(default=4, description="chains sampled for each problem in a round")
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="divisor of the logits when sampling")
    rationalize: bool = Field(
        default=False, description="sample again with the answer as a hint where every chain was wrong"
    )


class ChainOfThoughtConfig(SftConfig):
    """Config of a chain-of-thought run."""

    metrics: ClassVar[tuple[str, ...]] = LANGUAGE_METRICS

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
    def generates(self) -> bool:
        return self.validates and self.evaluation.problems > 0

    @property
    def num_generated(self) -> int:
        return self.evaluation.problems * self.generation.chains

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        yield from _check_step_format(self.data)
        yield from _check_accuracy(self)
        yield from _check_generation(self.generation)

    def check_files(self) -> Iterator[Problem]:
        yield from super().check_files()
        if self.generation.reward_model is not None:
            yield from check_reward_model("generation.reward_model", self.generation.reward_model)

    def example_row(self, source: str) -> str:
        is_text = source.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")
        return EXAMPLE_ROW + (EXAMPLE_LINES if is_text else "")

    def effects(self) -> dict[str, tuple[bool, str]]:
        checks_answers = self.generates or self.self_improvement is not None
        return {**super().effects(), "evaluation.checker": (checks_answers, "no answers are generated")}


def _check_step_format(data: ReasoningDataSection) -> Iterator[Problem]:
    if not isinstance(data.step_format, StepFormatSection):
        return
    for name in ("closing", "answer_marker"):
        value = getattr(data.step_format, name)
        if value and not value.strip():
            yield Problem((f"data.step_format.{name}",), "only white space", "visible text, or nothing")


def _check_accuracy(config: ChainOfThoughtConfig) -> Iterator[Problem]:
    """Refuse accuracy as the deciding metric where some validations do not measure it."""
    if not config.validates or (config.evaluation.problems > 0 and config.evaluation.every == 1):
        return
    for field, metric in config.named_metrics():
        if metric == "accuracy":
            actual = '"accuracy", which is not part of every validation'
            expected = '"loss", or evaluation.problems of at least 1 and evaluation.every 1'
            yield Problem((field, "evaluation.problems", "evaluation.every"), actual, expected)


def _check_generation(generation: ReasoningGenerationSection) -> Iterator[Problem]:
    if generation.reward_model is not None and Strategy.parse(generation.strategy).kind not in RANKED:
        fields = ("generation.reward_model", "generation.strategy")
        yield Problem(fields, f'a reward model with "{generation.strategy}"', '"best_of_n:N" or "step_beam:BxK"')
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
