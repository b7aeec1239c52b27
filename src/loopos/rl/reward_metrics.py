"""Metrics of rewards: each by itself, over the answers that it judged, and whether it tells the answers to one prompt
apart.

Apart from `collector`, because online preference optimization and commands measure answers without rollouts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from loopos.config.diagnostics import UserError
from loopos.rl.rewards import FRACTION, Response


class Answer(Protocol):
    """A response with its score, NaN where no reward judged it, and the parts of the score."""

    @property
    def response(self) -> Response: ...
    @property
    def score(self) -> float: ...
    @property
    def parts(self) -> Mapping[str, float]: ...


def judged(values: Sequence[float]) -> list[float]:
    """The values of the answers that were judged."""
    return [value for value in values if not math.isnan(value)]


def reward_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """`reward` and `reward_std`, and of each part `score_NAME` and `score_NAME_std`, over the answers that it judged;
    `judged` and `judged_NAME`, their fraction where it is below 1; `no_signal` and `no_signal_NAME`, the fraction of
    the prompts with several answers whose judged scores are all equal. Raises `UserError` where no answer was judged.
    """
    found = _of_one(answers, "reward", "", [answer.score for answer in answers])
    if "reward" not in found:
        raise UserError(
            f"no reward judged any of {len(answers)} answers: there is nothing to learn from; a reward of "
            "reward.functions must return a number for some of them"
        )
    for name in dict.fromkeys(name for answer in answers for name in answer.parts):
        if name.startswith(FRACTION):
            # Absent where a rank saw none.
            found[name] = statistics.fmean(answer.parts.get(name, 0.0) for answer in answers)
        else:
            values = [answer.parts.get(name, math.nan) for answer in answers]
            found |= _of_one(answers, f"score_{name}", f"_{name}", values)
    return found


def _of_one(answers: Sequence[Answer], name: str, suffix: str, values: Sequence[float]) -> dict[str, float]:
    known = judged(values)
    found = {f"judged{suffix}": len(known) / len(values)} if len(known) < len(values) else {}
    if known:
        found |= {name: statistics.fmean(known), f"{name}_std": statistics.pstdev(known)}
    groups = [group for group in _groups(answers, values) if len(group) > 1]
    if groups:
        found[f"no_signal{suffix}"] = statistics.fmean(len(set(judged(group))) < 2 for group in groups)
    return found


def _groups(answers: Sequence[Answer], values: Sequence[float]) -> Iterator[list[float]]:
    """The values of the answers to each prompt, which follow each other."""
    rows = zip(answers, values, strict=True)
    # Tasks of an environment may have equal prompts.
    for _, group in itertools.groupby(rows, key=lambda row: (*row[0].response.prompt_ids, row[0].response.source)):
        yield [value for _, value in group]
