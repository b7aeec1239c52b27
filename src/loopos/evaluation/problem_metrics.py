"""Problems with known answers → metrics of a model's answers, and a record of each.

Enters: answered problems, their examples, a checker. Leaves: metrics by name, and records for samples.jsonl. Left out:
the generation (`reasoning`), metrics of samples (`answer_metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopos.data.demonstrations import Demonstration
from loopos.data.step_format import StepFormat
from loopos.evaluation.answer_metrics import Verdict, answer_metrics, judge
from loopos.evaluation.checkers import RIGHT, Checker
from loopos.evaluation.reasoning import Answered


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
            place=example.row.where,
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
    """One line of samples.jsonl: what was asked, wanted and said."""
    chosen = answered.chosen or 0
    chain = answered.chains[chosen]
    told: dict[str, Any] = {
        "problem": example.problem,
        "wanted": example.answer,
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
