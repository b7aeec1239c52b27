"""Checkers of answers by name, built-in or a user's function; and metrics of sampled chains: accuracy, pass@k,
majority@k.

A checker scores an answer from 0 to 1, where 1 is correct. A user's code runs only if named ("module:function").
Letters: n samples of a problem, c of them correct, k of them drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.extras import install_command
from loopos.config.own_function import own_function
from loopos.data.record import shown
from loopos.data.step_format import Parsed, StepFormat
from loopos.evaluation.answers import automatic, choice, exact, numeric, vote_key
from loopos.evaluation.own_code import number_of
from loopos.functional.comparing import plurality

Checker: TypeAlias = Callable[[str, str, Mapping[str, object]], float]
"""(answer, expected answer, the row of data) → score."""

NAMES = ("auto", "exact", "numeric", "choice", "math_verify", "reasoning_gym")
RIGHT = 1.0
"""The score from which an answer counts as correct."""


def checker(name: str, *, tolerance: float = 1e-6) -> Checker:
    """The checker called `name`: one of `NAMES`, or "module:function", called as `function(answer, expected, row)`.

    tolerance: relative error at which numbers count as equal (auto and numeric). Raises `UserError` for an unknown
    name, `MissingRequirement` for a package that is not installed.
    """
    match name:
        case "auto":
            return lambda answer, expected, row: float(automatic(answer, expected, tolerance=tolerance))
        case "exact":
            return lambda answer, expected, row: float(exact(answer, expected))
        case "numeric":
            return lambda answer, expected, row: float(numeric(answer, expected, tolerance=tolerance))
        case "choice":
            return lambda answer, expected, row: float(choice(answer, expected))
        case "math_verify":
            return _math_verify()
        case "reasoning_gym":
            return _reasoning_gym()
    if ":" in name:
        return _users(name)
    raise UserError(f"checker: got {name}, expected one of {', '.join(NAMES)}, or module:function")


# Words of three letters and more, other than functions: a sentence, which may contain an expression.
_SENTENCE = re.compile(r"(?<!\\)\b(?!(?:sqrt|sin|cos|tan|log|exp|frac|pi)\b)[^\W\d]{3,}|\$|\\[(\[]|\\boxed")


def _math_verify() -> Checker:
    """Equality of mathematical expressions, by the package math-verify; texts that it cannot parse are compared as
    text.
    """
    package = _extra("math_verify", "math-verify")

    def parsed(text: str) -> list[Any]:
        # From "x + 1" without marks around it the package reads only 1.
        forms = (text, f"${text}$") if _SENTENCE.search(text) else (f"${text}$", text)
        found: list[Any] = package.parse(forms[0]) or package.parse(forms[1])
        return found

    def check(answer: str, expected: str, row: Mapping[str, object]) -> float:
        reference, got = parsed(expected), parsed(answer)
        is_equal = bool(reference and got) and package.verify(reference, got)
        return float(is_equal or exact(answer, expected))

    return check


def _reasoning_gym() -> Checker:
    """The scorer of a row's task, by the package reasoning-gym; rows need its column metadata."""
    package = _extra("reasoning_gym", "reasoning-gym")

    def check(answer: str, expected: str, row: Mapping[str, object]) -> float:
        metadata = row.get("metadata")
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if not isinstance(task, str):
            raise UserError(
                "checker reasoning_gym: got a row without metadata.source_dataset, expected rows as written by "
                "reasoning-gym; keep the column metadata, or use another checker"
            )
        entry = {**row, "answer": expected, "metadata": metadata}
        return float(package.get_score_answer_fn(task)(answer, entry))

    return check


def _extra(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as problem:
        raise MissingRequirement(
            f"checker {module}: the package {package} is not installed ({problem}); run\n  {install_command('rewards')}"
        ) from problem


def _users(name: str) -> Checker:
    function = own_function(name, "checker")

    def check(answer: str, expected: str, row: Mapping[str, object]) -> float:
        about = f"the answer {shown(answer)} where {shown(expected)} is expected"
        returned = function(answer, expected, dict(row), about=about)
        score = number_of(returned)
        if score is None or not 0 <= score <= 1:
            raise function.error(
                f"returned {shown(returned)}; expected true, false or a number from 0 to 1\n    for {about}"
            )
        return score

    return check


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated text. `num_tokens` includes the end token; `ended`: by an end token, not by a limit. `teacher`: the
    column of `data.stored_logprobs`, None without it.
    """

    text: str
    num_tokens: int
    ended: bool
    teacher: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sample, parsed and checked."""

    sample: Sample
    parsed: Parsed
    score: float

    @property
    def is_right(self) -> bool:
        return self.score >= RIGHT


def judge(
    samples: Sequence[Sample],
    expected: str,
    row: Mapping[str, object],
    *,
    step_format: StepFormat,
    checker: Checker,
    location: str = "",
) -> list[Verdict]:
    """A verdict on each sample of one problem; a sample without an answer scores 0. location: of the row, for messages.
    Raises `UserError` as the checker does.
    """
    verdicts = []
    for sample in samples:
        parsed = step_format.parse(sample.text)
        try:
            score = checker(parsed.answer, expected, row) if parsed.answer else 0.0
        except UserError as error:
            raise UserError(f"{location}: {error}" if location else str(error)) from error
        verdicts.append(Verdict(sample, parsed, score))
    return verdicts


def answer_metrics(problems: Sequence[Sequence[Verdict]], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """Means over problems, each with the same number of samples.

    accuracy: fraction of correct samples · pass@k and majority@k for each of `ks` · format_rate: fraction in the step
    format · mean_steps · mean_tokens · end_rate: fraction ended by an end token. Raises ValueError if there is no
    problem, and for a k above the number of samples.
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
    """1 − C(n−c, k) / C(n, k): the unbiased probability that one of k of the n samples is correct (Chen et al. 2021,
    section 2.1).
    """
    assert 0 <= num_right <= num_samples, (num_right, num_samples)
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str]) -> tuple[int, float] | None:
    """The index of the first of the answers that most chains agree on (Wang et al. 2022), and their fraction of all.

    Answers agree if their `vote_key` is equal; blank ones have no vote but count in the total; on a tie the group that
    comes first wins. None if all are blank.
    """
    return plurality([vote_key(answer) or None for answer in answers])


def _majority_is_right(verdicts: Sequence[Verdict]) -> bool:
    winner = majority([verdict.parsed.answer for verdict in verdicts])
    return winner is not None and verdicts[winner[0]].is_right


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
