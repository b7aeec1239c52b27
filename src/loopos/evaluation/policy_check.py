"""A policy in training, measured on prompts that it is not trained on.

Enters: validation prompts, a collector, perhaps a judge that training does not see. Leaves: metrics and a record of
each answer. The first answers are kept: later ones are compared with them. Left out: what follows (`training`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loopos.evaluation.best_of_n import best_of_n
from loopos.evaluation.policy_metrics import win_rate
from loopos.evaluation.rewards import Response
from loopos.evaluation.rollout import Collector, request_of, rollout_metrics
from loopos.functional.advantages import KlEstimator
from loopos.generation.settings import SamplingSettings

Judge = Callable[[Sequence[Response]], list[float]]


class PolicyCheck:
    """Asks the same prompts each time, with the same seeds."""

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        judge: Judge | None,
        *,
        estimator: KlEstimator,
        kl_limit: float | None,
    ) -> None:
        """kl_limit: nats a response above which "reward_within_kl" is −inf."""
        self.collector, self.prompts, self.sampling, self.judge = collector, prompts, sampling, judge
        self.estimator, self.kl_limit = estimator, kl_limit
        self._first: dict[str, list[float]] = {}

    def measure(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and records of all prompts, the same on every rank. "judge" is the mean of the judge's scores,
        "win_rate" the share of prompts whose answer scores higher by it than before training, ties half;
        "reward_win_rate" the same by the reward. is_start: these are the answers before training, which later ones are
        compared with; without them there are no win rates.
        """
        rollouts = self.collector(request_of(self.prompts, self.sampling))
        metrics = rollout_metrics(rollouts, estimator=self.estimator)
        if self.kl_limit is not None:
            metrics["reward_within_kl"] = metrics["reward"] if metrics["kl"] <= self.kl_limit else -math.inf
        scores = {"reward": [rollout.score for rollout in rollouts]}
        if self.judge is not None:
            scores["judge"] = self.judge([rollout.response for rollout in rollouts])
            metrics["judge"] = statistics.fmean(scores["judge"])
        if self._first:
            metrics["reward_win_rate"] = win_rate(scores["reward"], self._first["reward"]).rate
            if self.judge is not None:
                metrics["win_rate"] = win_rate(scores["judge"], self._first["judge"]).rate
        if is_start:
            self._first = scores
        records = [
            {
                "prompt": rollout.response.prompt,
                "response": rollout.response.text,
                "ended": rollout.response.ended,
                "kl": rollout.kl(self.estimator),
                **{name: values[place] for name, values in scores.items()},
            }
            for place, rollout in enumerate(rollouts)
        ]
        return metrics, records

    def best_of_n(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """`best_of_n` on these prompts, with the policy as it is now; of 1 too, where the comparison begins. Nothing
        for no numbers.
        """
        if not numbers:
            return []
        every = sorted({1, *numbers})
        answers = self.collector.answers(request_of(self.prompts, self.sampling, every[-1]))
        return best_of_n(answers, lambda responses: self.collector.rewards(responses)["total"], every, self.judge)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the scores of the answers before training."""
        return {"first": self._first}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self._first = dict(state["first"])
