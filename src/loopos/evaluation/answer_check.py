"""Checks a model's answers to problems with known answers: metrics, and records for samples.jsonl; over all ranks.

Conversations without a checkable answer only give records. Generation is in `reasoning`, metrics of samples in
`checkers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from loopos.config.chain_of_thought import AnswerEvaluationSection, ReasoningGenerationSection
from loopos.config.keys import Strategy
from loopos.config.sft import SftGenerationSection
from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Completion, Example
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import TemplateRefusal
from loopos.evaluation.checkers import RIGHT, Checker, Verdict, answer_metrics, checker, judge
from loopos.evaluation.reasoning import Answered, Ranker, Reasoner
from loopos.generation.settings import SamplingParams
from loopos.generation.steps import StepLimits


def judge_all(
    answered: Sequence[Answered], examples: Sequence[Demonstration], *, step_format: StepFormat, checker: Checker
) -> list[list[Verdict]]:
    """A verdict on every chain of every problem."""
    return [
        judge(
            found.samples(),
            example.answer,
            example.row.values,
            step_format=step_format,
            checker=checker,
            location=example.row.location,
        )
        for found, example in zip(answered, examples, strict=True)
    ]


def problem_metrics(
    answered: Sequence[Answered], verdicts: Sequence[Sequence[Verdict]], *, voted: bool
) -> dict[str, float]:
    """accuracy: fraction of problems with a correct answer under the strategy; the metrics of `answer_metrics` (its own
    accuracy as sample_accuracy); and confidence, the mean fraction of votes, if answers were voted on.
    """
    samples = min(len(found.chains) for found in answered)
    ks = sorted({1, samples}) if samples > 1 and voted else []
    metrics = answer_metrics([list(found)[:samples] for found in verdicts], ks=ks)
    right = [is_right(found, judged) for found, judged in zip(answered, verdicts, strict=True)]
    found_metrics = {"accuracy": sum(right) / len(right)}
    if samples > 1:
        found_metrics["sample_accuracy"] = metrics["accuracy"]
    if voted and samples > 1:
        found_metrics["confidence"] = sum(found.confidence or 0.0 for found in answered) / len(answered)
    return found_metrics | {name: value for name, value in metrics.items() if name not in found_metrics}


def is_right(answered: Answered, verdicts: Sequence[Verdict]) -> bool:
    """Whether the answer chosen from a problem's chains is correct."""
    return answered.chosen is not None and verdicts[answered.chosen].score >= RIGHT


def record(answered: Answered, verdicts: Sequence[Verdict], example: Demonstration) -> dict[str, Any]:
    """One line of samples.jsonl: problem, expected answer and the model's."""
    chosen = answered.chosen or 0
    chain = answered.chains[chosen]
    line: dict[str, Any] = {
        "problem": example.problem,
        "expected": example.answer,
        "answer": answered.answer,
        "is_right": is_right(answered, verdicts),
        "text": chain.text,
        "tokens": len(chain.token_ids),
        "finish_reason": chain.finish_reason,
    }
    if answered.confidence is not None:
        line["confidence"] = answered.confidence
    if len(answered.chains) > 1:
        line["answers"] = [verdict.parsed.answer for verdict in verdicts]
    return line


Chat: TypeAlias = Conversation | Completion


def chats_of(examples: Sequence[Example]) -> list[Chat]:
    """Conversations and completions that have a question, but no answer to check."""
    return [each for each in examples if isinstance(each, Completion | Conversation) and question_of(each)]


def question_of(chat: Chat) -> str:
    """The question: the prompt, or the last message before the answer."""
    if isinstance(chat, Completion):
        return chat.prompt
    index = _answer_index(chat)
    return chat.messages[index - 1].content if index > 0 else ""


def answer_of(chat: Chat) -> str:
    """The reference answer."""
    return chat.completion if isinstance(chat, Completion) else chat.messages[_answer_index(chat)].content


def _answer_index(chat: Conversation) -> int:
    return max(index for index, message in enumerate(chat.messages) if message.role == ASSISTANT)


class SampleAnswers:
    """Generates answers to conversations and prompts, beside the reference answers of the data."""

    def __init__(self, reasoner: Reasoner, generation: SftGenerationSection, *, seed: int) -> None:
        self.reasoner, self.seed = reasoner, seed
        self.sampling = sampling_of(generation, seed=seed)

    def samples(
        self, chats: Sequence[Chat], *, shard: tuple[int, int], gather: Callable[[object], list[object]]
    ) -> list[dict[str, Any]]:
        """The model's answer to each, with the reference; the same on every rank. Skips those that the template refuses
        or that leave no room for an answer.
        """
        rank, world_size = shard
        answerable = [
            (chat, prompt) for chat in chats[rank::world_size] if (prompt := self._prompt_of(chat)) is not None
        ]
        prompts, sampling = [prompt for _, prompt in answerable], self.reasoner.sampling(self.sampling)
        completions = self.reasoner.engine.generate(prompts, sampling, logprobs=False) if prompts else []
        own = [
            {
                "prompt": question_of(chat),
                "reference": answer_of(chat),
                "response": found.text,
                "finish_reason": found.finish_reason,
            }
            for (chat, _), found in zip(answerable, completions, strict=True)
        ]
        parts = [part for part in gather(own) if isinstance(part, list)]
        longest = max(map(len, parts))
        return [part[index] for index in range(longest) for part in parts if index < len(part)]

    def _prompt_of(self, chat: Chat) -> list[int] | None:
        reasoner = self.reasoner
        try:
            prompt = prompt_tokens(reasoner.tokenizer, chat, template=reasoner.template)
        except TemplateRefusal:
            return None
        most = reasoner.engine.max_positions
        return prompt if prompt and (most is None or len(prompt) < most) else None


class AnswerCheck(SampleAnswers):
    """Generates answers to problems too, and checks them."""

    def __init__(
        self,
        reasoner: Reasoner,
        generation: ReasoningGenerationSection,
        evaluation: AnswerEvaluationSection,
        *,
        seed: int,
        ranker: Ranker | None = None,
    ) -> None:
        """ranker: as `Reasoner.answer` takes it. Raises `UserError` for an unknown checker."""
        super().__init__(reasoner, generation, seed=seed)
        self.limits = limits_of(generation)
        self.strategy, self.ranker = Strategy.parse(generation.strategy), ranker
        self.checker = checker(evaluation.checker, tolerance=evaluation.tolerance)

    def validate(
        self,
        problems: Sequence[Demonstration],
        chats: Sequence[Chat],
        shard: tuple[int, int],
        gather: Callable[[object], list[object]],
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """`measure` of the problems and `samples` of the conversations, if there are any."""
        metrics, records = self.measure(problems, shard=shard, gather=gather) if problems else ({}, [])
        return metrics, [*records, *(self.samples(chats, shard=shard, gather=gather) if chats else ())]

    def measure(
        self,
        problems: Sequence[Demonstration],
        *,
        shard: tuple[int, int] = (0, 1),
        gather: Callable[[object], list[object]] = lambda value: [value],
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and records of all problems, the same on every rank.

        shard: (rank, world_size): this process answers every `world_size`-th problem; gather(value) returns the values
        of all ranks.
        """
        rank, world_size = shard
        own = problems[rank::world_size]
        answered = self.reasoner.answer(
            own, self.sampling, strategy=self.strategy, limits=self.limits, ranker=self.ranker
        )
        verdicts = judge_all(answered, own, step_format=self.reasoner.step_format, checker=self.checker)
        parts = [part for part in gather(list(zip(answered, verdicts, own, strict=True))) if isinstance(part, list)]
        merged = [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]
        voted = self.strategy.kind in ("single", "self_consistency")
        metrics = problem_metrics([found for found, _, _ in merged], [judged for _, judged, _ in merged], voted=voted)
        return metrics, [record(found, judged, example) for found, judged, example in merged]


def sampling_of(section: SftGenerationSection, *, seed: int) -> SamplingParams:
    """The sampling settings of a response or chain."""
    return SamplingParams(
        temperature=section.temperature,
        top_k=section.top_k or 0,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        seed=seed,
    )


def limits_of(section: ReasoningGenerationSection) -> StepLimits:
    """Limits on the length of steps and chains."""
    return StepLimits(
        max_steps=section.max_reasoning_steps,
        max_step_tokens=section.max_step_tokens,
        min_thinking_tokens=section.min_thinking_tokens,
        max_thinking_tokens=section.max_thinking_tokens,
    )
