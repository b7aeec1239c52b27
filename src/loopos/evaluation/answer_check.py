"""Problems with known answers → metrics of a model's answers, and a record of each.

Enters: answered problems, their examples, a checker. Leaves: metrics by name, and records for samples.jsonl. Left out:
the generation (`reasoning`), metrics of samples (`answer_metrics`).

Validation by generated answers: problems → metrics and records, chats → records, over all ranks.

Enters: a reasoner, validation rows, the `generation` and `evaluation` sections. Leaves: metrics by name, a record a
row, and the settings that generation takes from a config. Left out: when it runs and where records go (`methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from loopos.config.chain_of_thought import AnswerEvaluationSection, ReasoningGenerationSection
from loopos.config.keys import Strategy
from loopos.data.conversations import ASSISTANT, Conversation
from loopos.data.demonstrations import Demonstration
from loopos.data.step_format import StepFormat
from loopos.data.supervised_rows import Completion, Example
from loopos.data.supervised_tokens import prompt_tokens
from loopos.data.templates import TemplateRefusal
from loopos.evaluation.checkers import RIGHT, Checker, Verdict, answer_metrics, checker, judge
from loopos.evaluation.reasoning import Answered, Reasoner
from loopos.generation.settings import SamplingSettings
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
            place=example.row.location,
        )
        for found, example in zip(answered, examples, strict=True)
    ]


def problem_metrics(
    answered: Sequence[Answered], verdicts: Sequence[Sequence[Verdict]], *, voted: bool
) -> dict[str, float]:
    """accuracy: share of problems whose answer, by the strategy, is right; then those of `answer_metrics` (its own
    accuracy as sample_accuracy), and confidence, the mean share of votes, where answers were voted on.
    """
    samples = min(len(found.chains) for found in answered)
    ks = sorted({1, samples}) if samples > 1 and voted else []
    metrics = answer_metrics([list(found)[:samples] for found in verdicts], ks=ks)
    right = [is_right(found, judged) for found, judged in zip(answered, verdicts, strict=True)]
    told = {"accuracy": sum(right) / len(right)}
    if samples > 1:
        told["sample_accuracy"] = metrics["accuracy"]
    if voted and samples > 1:
        told["confidence"] = sum(found.confidence or 0.0 for found in answered) / len(answered)
    return told | {name: value for name, value in metrics.items() if name not in told}


def is_right(answered: Answered, verdicts: Sequence[Verdict]) -> bool:
    """Whether the answer that speaks for a problem's chains is right."""
    return answered.chosen is not None and verdicts[answered.chosen].score >= RIGHT


def record(answered: Answered, verdicts: Sequence[Verdict], example: Demonstration) -> dict[str, Any]:
    """One line of samples.jsonl: what was asked, expected and said."""
    chosen = answered.chosen or 0
    chain = answered.chains[chosen]
    told: dict[str, Any] = {
        "problem": example.problem,
        "expected": example.answer,
        "answer": answered.answer,
        "is_right": is_right(answered, verdicts),
        "text": chain.text,
        "tokens": len(chain.token_ids),
        "finish_reason": chain.finish_reason,
    }
    if answered.confidence is not None:
        told["confidence"] = answered.confidence
    if len(answered.chains) > 1:
        told["answers"] = [verdict.parsed.answer for verdict in verdicts]
    return told


Chat: TypeAlias = Conversation | Completion


def chats_of(examples: Sequence[Example]) -> list[Chat]:
    """Those that ask something and have no answer to check."""
    return [each for each in examples if isinstance(each, Completion | Conversation) and question_of(each)]


def question_of(chat: Chat) -> str:
    """The question: the prompt, or the last message before the answer."""
    if isinstance(chat, Completion):
        return chat.prompt
    place = _answer_place(chat)
    return chat.messages[place - 1].content if place > 0 else ""


def answer_of(chat: Chat) -> str:
    """The data's answer."""
    return chat.completion if isinstance(chat, Completion) else chat.messages[_answer_place(chat)].content


def _answer_place(chat: Conversation) -> int:
    return max(index for index, message in enumerate(chat.messages) if message.role == ASSISTANT)


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

    def validate(
        self,
        problems: Sequence[Demonstration],
        chats: Sequence[Chat],
        share: tuple[int, int],
        gather: Callable[[object], list[object]],
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """`measure` of the problems and `samples` of the chats, where there are any."""
        metrics, records = self.measure(problems, share=share, gather=gather) if problems else ({}, [])
        return metrics, [*records, *(self.samples(chats, share=share, gather=gather) if chats else ())]

    def samples(
        self, chats: Sequence[Chat], *, share: tuple[int, int], gather: Callable[[object], list[object]]
    ) -> list[dict[str, Any]]:
        """The model's own answer to each, beside that of the data; the same on every rank. One that the template cannot
        ask, or that leaves no room for an answer, is left out.
        """
        rank, ranks = share
        answerable = [(chat, prompt) for chat in chats[rank::ranks] if (prompt := self._prompt_of(chat)) is not None]
        prompts, sampling = [prompt for _, prompt in answerable], self.reasoner.sampling(self.sampling)
        completions = self.reasoner.engine.generate(prompts, sampling, logprobs=False) if prompts else []
        mine = [
            {
                "prompt": question_of(chat),
                "reference": answer_of(chat),
                "response": found.text,
                "finish_reason": found.finish_reason,
            }
            for (chat, _), found in zip(answerable, completions, strict=True)
        ]
        parts = [part for part in gather(mine) if isinstance(part, list)]
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
        told = [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]
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
