"""Validation by generated answers: problems → metrics and records, over all ranks.

Enters: a reasoner, validation problems, the `generation` and `evaluation` sections. Leaves: metrics by name, a record a
problem, and the settings that generation takes from a config. Left out: when it runs and where records go (`methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loopos.config.chain_of_thought import AnswerEvaluationSection, ReasoningGenerationSection
from loopos.config.strategies import Strategy
from loopos.data.demonstrations import Demonstration
from loopos.evaluation.checkers import checker
from loopos.evaluation.problem_metrics import judge_all, problem_metrics, record
from loopos.evaluation.reasoning import Reasoner
from loopos.generation.settings import SamplingSettings
from loopos.generation.steps import StepLimits


class AnswerCheck:
    """Generates answers to problems and checks them."""

    def __init__(
        self,
        reasoner: Reasoner,
        generation: ReasoningGenerationSection,
        evaluation: AnswerEvaluationSection,
        *,
        seed: int,
    ) -> None:
        """Raises `UserError` for a checker that is not there."""
        self.reasoner, self.seed = reasoner, seed
        self.sampling, self.limits = sampling_of(generation, seed=seed), limits_of(generation)
        self.strategy = Strategy.parse(generation.strategy)
        self.checker = checker(evaluation.checker, tolerance=evaluation.tolerance)

    def measure(
        self,
        problems: Sequence[Demonstration],
        *,
        share: tuple[int, int] = (0, 1),
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and records of all problems, the same on every rank.

        share: (rank, ranks): this process answers every `ranks`-th problem; gather(value) gives the values of all
        ranks.
        """
        rank, ranks = share
        mine = problems[rank::ranks]
        answered = self.reasoner.answer(mine, self.sampling, strategy=self.strategy, limits=self.limits)
        verdicts = judge_all(answered, mine, step_format=self.reasoner.step_format, checker=self.checker)
        parts = [part for part in gather(list(zip(answered, verdicts, mine, strict=True))) if isinstance(part, list)]
        told = [part[place] for place in range(len(parts[0])) for part in parts if place < len(part)]
        voted = self.strategy.kind in ("single", "self_consistency")
        metrics = problem_metrics([found for found, _, _ in told], [judged for _, judged, _ in told], voted=voted)
        return metrics, [record(found, judged, example) for found, judged, example in told]


def sampling_of(section: ReasoningGenerationSection, *, seed: int) -> SamplingSettings:
    """How the tokens of a chain are chosen."""
    return SamplingSettings(
        temperature=section.temperature,
        top_k=section.top_k or 0,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        seed=seed,
    )


def limits_of(section: ReasoningGenerationSection) -> StepLimits:
    """How long steps and chains may be."""
    return StepLimits(
        max_steps=section.max_reasoning_steps,
        max_step_tokens=section.max_step_tokens,
        min_thinking_tokens=section.min_thinking_tokens,
        max_thinking_tokens=section.max_thinking_tokens,
    )
