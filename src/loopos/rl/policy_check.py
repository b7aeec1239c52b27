"""Measures a policy on validation prompts: rewards, win rates against the start, pass@k, and best-of-n of the initial
policy (Stiennon et al. 2020; Nakano et al. 2021).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loopos.evaluation.checkers import pass_at_k
from loopos.evaluation.policy_metrics import WinRate, best_of_n_expected, best_of_n_kl, win_rate
from loopos.functional.advantages import KlEstimator
from loopos.generation.settings import SamplingParams
from loopos.rl.collector import Collector, conversation, request_of, rollout_metrics
from loopos.rl.reward_metrics import judged
from loopos.rl.rewards import Response
from loopos.rl.workers.protocol import Task

Judge = Callable[[Sequence[Response]], list[float]]


def best_of_n(
    answers: Sequence[Sequence[Response]], score: Judge, numbers: Sequence[int], judge: Judge | None
) -> list[dict[str, Any]]:
    """Best-of-n by reward, for each n in `numbers`: `kl`; `reward`, the unbiased expected score of the best of n;
    `judge`, the judge's mean score of the best of each prompt's first n. answers: for every prompt at least as many
    responses as the largest n.
    """
    flat = [response for responses in answers for response in responses]
    scores = iter(score(flat))
    scored = [(responses, [next(scores) for _ in responses]) for responses in answers]
    # A prompt counts with all its answers, or not at all.
    scored = [(responses, row) for responses, row in scored if len(judged(row)) == len(row)]
    answers, table = [responses for responses, _ in scored], [row for _, row in scored]
    found: list[dict[str, Any]] = []
    for n in numbers if table else ():
        metrics: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n), "reward": best_of_n_expected(table, n)}
        if judge is not None:
            chosen = [
                responses[max(range(n), key=lambda index, scored=scored: scored[index])]  # type: ignore[misc]
                for responses, scored in zip(answers, table, strict=True)
            ]
            metrics["judge"] = statistics.fmean(judge(chosen))
        found.append(metrics)
    return found


def passing_metrics(scores: Sequence[float], number: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … and `number` (Chen et al. 2021, equation 1), of `number` scores to each prompt, one
    prompt after another; empty unless every score is 0 or 1.
    """
    if not set(scores) <= {0.0, 1.0}:
        return {}
    right = [int(sum(scores[start : start + number])) for start in range(0, len(scores), number)]
    powers = {2**exponent for exponent in range(number.bit_length())}
    numbers = sorted({*powers, number})
    return {f"pass@{k}": statistics.fmean(pass_at_k(number, each, k) for each in right) for k in numbers}


class PolicyCheck:
    """Measures the policy on the same prompts with the same seeds each time."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        judge: Judge | None,
        *,
        estimator: KlEstimator,
        kl_limit: float | None,
        responses: int = 1,
        tasks: Sequence[Task] | None = None,
    ) -> None:
        """kl_limit: nats per response above which "reward_within_kl" is −inf. responses: to each prompt. tasks: as for
        `request_of`.
        """
        self.responses, self.tasks = responses, tasks
        self.collector, self.prompts, self.sampling, self.judge = collector, prompts, sampling, judge
        self.estimator, self.kl_limit = estimator, kl_limit
        self._first: dict[str, list[float]] = {}

    def measure(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and one record per prompt, the same on every rank. "judge": the judge's mean score. "win_rate": the
        fraction of prompts whose response the judge scores higher than the response before training, with its 95%
        interval "win_rate_low" to "win_rate_high"; ties count half. "reward_win_rate": the same by reward. is_start:
        store these responses as the baseline; without a baseline there are no win rates. With several responses to a
        prompt, judge, win rates and records are of the first one.
        """
        number = self.responses
        tasks = None if self.tasks is None else [task for task in self.tasks for _ in range(number)]
        prompts = [prompt for prompt in self.prompts for _ in range(number)]
        every = self.collector(request_of(prompts, self.sampling, tasks=tasks))
        rollouts = every[:: self.responses]
        is_rewarded = self.collector.rewards is not None
        metrics = rollout_metrics(every, estimator=self.estimator, is_rewarded=is_rewarded)
        if self.responses > 1 and is_rewarded:
            metrics |= passing_metrics([rollout.score for rollout in every], self.responses)
        if self.kl_limit is not None:
            metrics["reward_within_kl"] = metrics["reward"] if metrics["kl"] <= self.kl_limit else -math.inf
        scores = {"reward": [rollout.score for rollout in rollouts]} if is_rewarded else {}
        if self.judge is not None:
            scores["judge"] = self.judge([rollout.response for rollout in rollouts])
            metrics["judge"] = statistics.fmean(scores["judge"])
        if self._first:
            if is_rewarded and (won := _won(scores["reward"], self._first["reward"])) is not None:
                metrics["reward_win_rate"] = won.rate
            if self.judge is not None and (won := _won(scores["judge"], self._first["judge"])) is not None:
                metrics |= {"win_rate": won.rate, "win_rate_low": won.low, "win_rate_high": won.high}
        if is_start:
            self._first = scores
        records = [
            {
                "prompt": rollout.response.prompt,
                "response": rollout.response.text,
                "ended": rollout.response.ended,
                **conversation(rollout.response),
                **({"kl": kl} if (kl := rollout.kl(self.estimator)) is not None else {}),
                **{name: _or_null(values[index]) for name, values in scores.items()},
            }
            for index, rollout in enumerate(rollouts)
        ]
        return metrics, records

    def best_of_n(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """`best_of_n` on these prompts with the current policy, always including n = 1; empty for no numbers."""
        if not numbers:
            return []
        every = sorted({1, *numbers})
        rewards = self.collector.rewards
        assert rewards is not None, "the best of n is chosen by rewards"
        answers = self.collector.answers(request_of(self.prompts, self.sampling, every[-1], tasks=self.tasks))
        return best_of_n(answers, lambda responses: rewards(responses)["total"], every, self.judge)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the scores of the responses before training."""
        return {"first": {name: [*map(_or_null, scores)] for name, scores in self._first.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`."""
        first = state["first"].items()
        self._first = {name: [math.nan if each is None else each for each in scores] for name, scores in first}


def _won(ours: Sequence[float], baseline: Sequence[float]) -> WinRate | None:
    """The win rate over the prompts that both were judged on; None without any."""
    pairs = [pair for pair in zip(ours, baseline, strict=True) if len(judged(pair)) == 2]
    return win_rate(*zip(*pairs, strict=True)) if pairs else None


def _or_null(score: float) -> float | None:
    return None if math.isnan(score) else score
