"""The signal that prompts give to reinforcement learning: how often their answers differ in reward, and what to change.

An algorithm that compares answers to one prompt learns nothing where all rewards of a group are equal. Letters: P
prompts, k sampled answers to each, n answers of a group in training (n ≤ k).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopos.evaluation.checkers import Sample
from loopos.evaluation.sample_metrics import PromptFigures, sample_metrics

# A fraction from here on is worth a sentence.
_MANY, _FEW = 0.5, 0.1
_SOLVED = 0.95
_LENGTH_CORRELATION = 0.5
_MOST_OF_THE_SPREAD = 0.9


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """The answers to one prompt. `scores`: the whole reward of each answer; `parts`: its unweighted terms by name."""

    answers: tuple[Sample, ...]
    scores: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ."""
        return len(set(self.scores)) > 1


def signal_metrics(
    groups: Sequence[SampledGroup], *, weights: Mapping[str, float], threshold: float | None, group_size: int
) -> dict[str, Any]:
    """Figures by name, as docs/metrics.md defines them: those of `loopos sample`, `signal` and `signal@n`, and `parts`.

    Args:
        weights: Of the terms of the reward.
        threshold: From which reward an answer passes; None where there is no passing.
        group_size: n, the answers to a prompt in training.
    """
    figures = [PromptFigures.of(each.answers, each.scores) for each in groups]
    found = sample_metrics(figures, threshold=threshold)
    found["signal"] = statistics.fmean(each.has_signal for each in groups)
    if 1 < group_size <= len(groups[0].scores):
        found[f"signal@{group_size}"] = statistics.fmean(signal_of(each.scores, group_size) for each in groups)
    if threshold is not None:
        found["all_pass"] = statistics.fmean(min(each.scores) >= threshold for each in groups)
        found["none_pass"] = statistics.fmean(max(each.scores) < threshold for each in groups)
    found["parts"] = {name: _part_figures(groups, name, weight) for name, weight in weights.items()}
    return found


def signal_of(scores: Sequence[float], group_size: int) -> float:
    """1 − Σ_v C(c_v, n) / C(k, n) over the values v of the k scores, c_v of which are v: the unbiased probability that
    n of the answers, drawn without replacement, do not all have the same reward.
    """
    ways = math.comb(len(scores), group_size)
    return 1.0 - sum(math.comb(count, group_size) for count in Counter(scores).values()) / ways


def _part_figures(groups: Sequence[SampledGroup], name: str, weight: float) -> dict[str, float]:
    """Mean and standard deviation over all answers, the deviation within groups times the weight, and the fraction of
    groups whose answers all have the same score.
    """
    scores = [each.parts[name] for each in groups]
    every = [score for each in scores for score in each]
    return {
        "mean": statistics.fmean(every),
        "std": statistics.pstdev(every),
        "weighted_std_in_group": abs(weight) * statistics.fmean(statistics.pstdev(each) for each in scores),
        "no_signal": statistics.fmean(len(set(each)) == 1 for each in scores),
    }


def advice(metrics: Mapping[str, Any], *, compares_groups: bool, temperature: float) -> Iterator[str]:
    """What to change before training, a sentence or two each. metrics: of `signal_metrics`. compares_groups: whether
    the algorithm compares the answers to one prompt.
    """
    yield from _about_rewards(metrics, compares_groups=compares_groups)
    if metrics["end_rate"] < 1 - _MANY / 2:
        yield (
            f"{1 - metrics['end_rate']:.0%} of the answers end at the token limit: raise generation.max_new_tokens, or "
            "teach the model to end its answers first (sft), or set generation.missing_end_penalty"
        )
    if metrics["duplicates"] > _MANY:
        change = "raise generation.temperature" if temperature < 1 else "the model hardly varies its answers"
        yield f"{metrics['duplicates']:.0%} of the answers repeat another answer to their prompt: {change}"
    correlation = metrics.get("score_length_correlation")
    if correlation is not None and abs(correlation) > _LENGTH_CORRELATION:
        direction = "longer" if correlation > 0 else "shorter"
        yield (
            f"the reward prefers {direction} answers to the same prompt (correlation {correlation:.2f}): training can "
            f"raise it by length; check that {direction} is better, or bound the length in the reward"
        )
    yield from _about_parts(metrics["parts"])


def _about_rewards(metrics: Mapping[str, Any], *, compares_groups: bool) -> Iterator[str]:
    none_pass, all_pass = metrics.get("none_pass", 0.0), metrics.get("all_pass", 0.0)
    if none_pass == 1:
        yield (
            "no answer passes: reinforcement learning has nothing to reinforce. Teach the task first (sft or "
            "chain_of_thought on solved examples), take easier prompts, or add a reward for partial success"
        )
    elif all_pass == 1 or metrics.get("pass@1", {}).get("rate", 0.0) > _SOLVED:
        yield "nearly every answer passes: there is little to learn; take harder prompts"
    elif metrics["signal"] < _FEW:
        yield (
            f"only {metrics['signal']:.0%} of the prompts have answers of different reward: train on those (-o FILE "
            "writes them), or take prompts of another difficulty"
        )
    elif compares_groups and metrics["signal"] < _MANY:
        yield (
            f"{1 - metrics['signal']:.0%} of the groups have no signal: train on the prompts that have (-o FILE writes "
            "them), or raise generation.responses_per_prompt"
        )


def _about_parts(parts: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for name, each in parts.items():
        if each["std"] == 0:
            yield f"the reward {name} is {each['mean']:g} for every answer: it teaches nothing; remove or change it"
    spread = {name: each["weighted_std_in_group"] for name, each in parts.items()}
    total = sum(spread.values())
    if len(parts) > 1 and total > 0:
        name = max(spread, key=lambda each: spread[each])
        if spread[name] > _MOST_OF_THE_SPREAD * total:
            yield (
                f"the reward {name} makes {spread[name] / total:.0%} of the differences within groups: the other "
                "rewards hardly count; change the weights if they should"
            )
