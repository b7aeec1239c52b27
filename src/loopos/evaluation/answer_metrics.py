"""Sampled chains → metrics: accuracy, pass@k, majority@k, and how the chains look.

Enters: the samples of each problem, the wanted answers, the format of the chains and a checker. Leaves: a verdict on
each sample, and a dict of name → float. Left out: sampling (`generation`), what a right answer is (`checkers`).
Letters: n samples of a problem, c of them right, k of them drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopos.config.faults import UserError
from loopos.data.step_format import Parsed, StepFormat
from loopos.evaluation.answers import vote_key
from loopos.evaluation.checkers import RIGHT, Checker
from loopos.functional.voting import plurality


@dataclass(frozen=True, slots=True)
class Sample:
    """One text that a model said. `num_tokens` with the end token; `ended`: by an end token, not by a limit."""

    text: str
    num_tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sample, taken apart and checked."""

    sample: Sample
    parsed: Parsed
    score: float

    @property
    def is_right(self) -> bool:
        return self.score >= RIGHT


def judge(
    samples: Sequence[Sample],
    wanted: str,
    row: Mapping[str, object],
    *,
    step_format: StepFormat,
    checker: Checker,
    place: str = "",
) -> list[Verdict]:
    """A verdict on each sample of one problem; a sample without an answer scores 0. place: of the row, for messages.
    Raises `UserError` as the checker does.
    """
    verdicts = []
    for sample in samples:
        parsed = step_format.parse(sample.text)
        try:
            score = checker(parsed.answer, wanted, row) if parsed.answer else 0.0
        except UserError as error:
            raise UserError(f"{place}: {error}" if place else str(error)) from error
        verdicts.append(Verdict(sample, parsed, score))
    return verdicts


def answer_metrics(problems: Sequence[Sequence[Verdict]], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """Means over problems, each with as many samples.

    accuracy: share of samples that are right · pass@k and majority@k for each of `ks` · format_rate: share that keeps
    to the step format · mean_steps · mean_tokens · end_rate: share that ends by an end token. Raises ValueError where
    there is no problem, and for a k above the number of samples.
    """
    if not problems or not problems[0]:
        raise ValueError("no samples to measure")
    samples = {len(verdicts) for verdicts in problems}
    if len(samples) > 1 or max(ks, default=0) > min(samples) or min(ks, default=1) < 1:
        raise ValueError(f"ks {list(ks)} and {sorted(samples)} samples of a problem")
    flat = [verdict for verdicts in problems for verdict in verdicts]
    metrics = {"accuracy": _mean([verdict.is_right for verdict in flat])}
    for k in ks:
        rights = [sum(verdict.is_right for verdict in verdicts) for verdicts in problems]
        metrics[f"pass@{k}"] = _mean([pass_at_k(min(samples), right, k) for right in rights])
        metrics[f"majority@{k}"] = _mean([_majority_is_right(verdicts[:k]) for verdicts in problems])
    metrics["format_rate"] = _mean([verdict.parsed.well_formed for verdict in flat])
    metrics["mean_steps"] = _mean([len(verdict.parsed.steps) for verdict in flat])
    metrics["mean_tokens"] = _mean([verdict.sample.num_tokens for verdict in flat])
    metrics["end_rate"] = _mean([verdict.sample.ended for verdict in flat])
    return metrics


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): the chance that one of k of the n samples is right, without bias (Chen et al. 2021,
    section 2.1).
    """
    assert 0 <= num_right <= num_samples, (num_right, num_samples)
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str]) -> tuple[int, float] | None:
    """The place of the first of the answers that most agree on (Wang et al. 2022), and their share of all.

    Answers agree when their `vote_key` is equal; blank ones have no voice but count in the share; of equally many, the
    group that comes first wins. None where all are blank.
    """
    return plurality([vote_key(answer) or None for answer in answers])


def _majority_is_right(verdicts: Sequence[Verdict]) -> bool:
    winner = majority([verdict.parsed.answer for verdict in verdicts])
    return winner is not None and verdicts[winner[0]].is_right


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
