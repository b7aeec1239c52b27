"""Metrics of several scored responses to each prompt: pass@k, the best of k, signal, duplicates, bias to length.

A metric that is not defined for its input is left out.
Letters: P prompts, n responses to each, c of them pass, k of them drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopos.evaluation.checkers import Sample, pass_at_k
from loopos.evaluation.policy_metrics import best_of_n_expected, wilson_interval


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """The responses to one prompt in numbers. `scores`: None for one that could not be judged. `exact`, `normalized`:
    responses that repeat an earlier one to the letter, and apart from white space. `blank`: responses without text.
    """

    scores: tuple[float | None, ...]
    tokens: tuple[int, ...]
    ended: int
    exact: int
    normalized: int
    blank: int

    @classmethod
    def of(cls, samples: Sequence[Sample], scores: Sequence[float | None]) -> PromptFigures:
        texts = [sample.text for sample in samples]
        return cls(
            tuple(scores),
            tuple(sample.num_tokens for sample in samples),
            sum(sample.ended for sample in samples),
            len(texts) - len(set(texts)),
            len(texts) - len({normalized(text) for text in texts}),
            sum(not text.strip() for text in texts),
        )

    @property
    def judged(self) -> list[tuple[float, int]]:
        """Score and tokens of the responses that were judged."""
        return [(s, t) for s, t in zip(self.scores, self.tokens, strict=True) if s is not None]


def normalized(text: str) -> str:
    """The text with single spaces for white space, and none around it."""
    return " ".join(text.split())


def sample_metrics(prompts: Sequence[PromptFigures], *, threshold: float | None) -> dict[str, Any]:
    """All figures by name, as docs/metrics.md defines them. threshold: from which score a response passes; None: there
    is no passing. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("no prompts to measure")
    responses = sum(len(each.tokens) for each in prompts)
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "responses": responses,
        "mean_tokens": sum(sum(each.tokens) for each in prompts) / responses,
        "end_rate": sum(each.ended for each in prompts) / responses,
        "blank": sum(each.blank for each in prompts) / responses,
        "duplicates_exact": sum(each.exact for each in prompts) / responses,
        "duplicates": sum(each.normalized for each in prompts) / responses,
    }
    judged = [each.judged for each in prompts]
    num_judged = sum(map(len, judged))
    if num_judged:
        found["unjudged"] = responses - num_judged
        found |= _score_metrics(judged)
        # Only prompts with all their scores: a best of fewer would be lower.
        whole = [[score for score, _ in each] for each, one in zip(judged, prompts, strict=True)
                 if len(each) == len(one.tokens)]  # fmt: skip
        if whole:
            found |= _best_metrics(whole, threshold)
    return found


def powers_to(n: int) -> list[int]:
    """1, 2, 4, … and n itself."""
    return sorted({n, *(2**power for power in range(n.bit_length()))})


def _score_metrics(judged: Sequence[Sequence[tuple[float, int]]]) -> dict[str, float]:
    """Of score and tokens of the judged responses to each prompt."""
    some = [each for each in judged if each]
    means = [statistics.fmean(score for score, _ in each) for each in some]
    found = {
        "mean_score": statistics.fmean(means),
        "no_signal": sum(len({score for score, _ in each}) == 1 for each in some) / len(some),
    }
    correlation = length_correlation(some)
    return found if correlation is None else found | {"score_length_correlation": correlation}


def _best_metrics(scores: Sequence[Sequence[float]], threshold: float | None) -> dict[str, Any]:
    """best_of@k, and pass@k with its interval, of the scores `[P, n]`.

    The interval is Wilson's, with each prompt as one trial: the variance of a value from 0 to 1 is at most that of a
    coin with its mean, so it is conservative.
    """
    ks = powers_to(len(scores[0]))
    found: dict[str, Any] = {f"best_of@{k}": best_of_n_expected(scores, k) for k in ks}
    if threshold is None:
        return found
    for k in ks:
        passing = [pass_at_k(len(each), sum(score >= threshold for score in each), k) for each in scores]
        low, high = wilson_interval(math.fsum(passing), len(passing))
        found[f"pass@{k}"] = {"rate": statistics.fmean(passing), "low": low, "high": high}
    return found


def length_correlation(prompts: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Pearson's correlation of score and tokens within prompts: both minus their prompt's mean, over all responses.

    Differences between prompts do not count: hard ones have long answers and low scores. None where score or length
    never differs.
    """
    scores: list[float] = []
    lengths: list[float] = []
    for each in prompts:
        score_mean, length_mean = (statistics.fmean(values) for values in zip(*each, strict=True))
        scores += [score - score_mean for score, _ in each]
        lengths += [length - length_mean for _, length in each]
    spread = math.sqrt(math.fsum(s * s for s in scores)) * math.sqrt(math.fsum(t * t for t in lengths))
    if spread == 0:
        return None
    return max(-1.0, min(1.0, math.fsum(s * t for s, t in zip(scores, lengths, strict=True)) / spread))
