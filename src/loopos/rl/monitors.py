"""Alarms of a reinforcement learning run: has the policy left its reference, collapsed, or found a hole in the reward?

Enters: an iteration's metrics by name: kl (nats to the reference), entropy (nats), response_length (tokens),
repetition, end_share (shares), reward (the trained reward model's), judge (that of one it was not trained on). Leaves:
alarms, each a sentence with its numbers. Left out: measuring (`evaluation.policy_metrics`) and what is done about an
alarm (`methods`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LABELS = {"kl": "KL", "repetition": "repetition"}
_MEANINGS = {"kl": "the policy moves far from its reference", "repetition": "responses repeat themselves"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorLimits:
    """How far a run may go; None guards nothing. `first` is a metric's value when it was first measured.

    `kl`: most nats. `entropy_share`: least share of the first entropy. `length_ratio`: response lengths stay between
    first / ratio and first · ratio. `repetition`: most. `end_share_drop`: most that end_share may lie under its first.
    `judge_drop`: most that the judge may lie under its best, in its own unit, while the reward is above its first.
    `patience`: an alarm sounds after so many iterations in a row beyond its limit. Raises ValueError on limits that
    every run or no run would pass.
    """

    kl: float | None = None
    entropy_share: float | None = None
    length_ratio: float | None = None
    repetition: float | None = None
    end_share_drop: float | None = None
    judge_drop: float | None = None
    patience: int = 1

    def __post_init__(self) -> None:
        highest = {"entropy_share": 1.0, "repetition": 1.0, "end_share_drop": 1.0}
        for name in ("kl", "entropy_share", "length_ratio", "repetition", "end_share_drop", "judge_drop"):
            limit = getattr(self, name)
            least, most = 1.0 if name == "length_ratio" else 0.0, highest.get(name, math.inf)
            if limit is not None and not (math.isfinite(limit) and least <= limit <= most):
                raise ValueError(f"{name} of {limit} given, expected a number from {least:g} to {most:g}")
        if self.patience < 1:
            raise ValueError(f"patience of {self.patience} given, expected at least 1")


@dataclass(frozen=True, slots=True)
class Alert:
    """`value` of the metric `name` is beyond `limit`; `message` says so."""

    name: str
    value: float
    limit: float
    message: str

    def as_json(self) -> dict[str, Any]:
        """The alarm for the log."""
        return {"name": self.name, "value": self.value, "limit": self.limit, "message": self.message}


class Monitor:
    """Watches one run. A metric that an iteration does not measure changes nothing: a judge asked every tenth
    iteration, or in a call of its own, is held against the latest reward.
    """

    def __init__(self, limits: MonitorLimits) -> None:
        self.limits = limits
        self._first: dict[str, float] = {}
        self._best_judge: float | None = None
        self._latest_reward: float | None = None
        # Iterations in a row beyond the limit, by the alarm's name.
        self._streaks: dict[str, int] = {}

    def observe(self, metrics: Mapping[str, float]) -> list[Alert]:
        """Takes one iteration's metrics, the first of which are the baseline; the alarms that sound now. One that goes
        on is silent until its metric was within the limit again. nan and inf are beyond every limit.
        """
        for name in ("entropy", "response_length", "end_share", "reward"):
            if math.isfinite(metrics.get(name, math.nan)):
                self._first.setdefault(name, float(metrics[name]))
        if math.isfinite(metrics.get("reward", math.nan)):
            self._latest_reward = float(metrics["reward"])
        judge = float(metrics.get("judge", math.nan))
        if math.isfinite(judge):
            self._best_judge = judge if self._best_judge is None else max(self._best_judge, judge)
        sounding = []
        for alert, is_beyond in self._checks(metrics):
            self._streaks[alert.name] = self._streaks.get(alert.name, 0) + 1 if is_beyond else 0
            if self._streaks[alert.name] == self.limits.patience:
                sounding.append(alert)
        return sounding

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; JSON."""
        return {
            "first": dict(self._first),
            "best_judge": self._best_judge,
            "latest_reward": self._latest_reward,
            "streaks": dict(self._streaks),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self._first, self._streaks = dict(state["first"]), dict(state["streaks"])
        self._best_judge, self._latest_reward = state["best_judge"], state["latest_reward"]

    def _checks(self, metrics: Mapping[str, float]) -> Iterator[tuple[Alert, bool]]:
        """Every alarm that is set and whose metric was measured, and whether its limit is passed."""
        limits = self.limits
        settings = {
            "kl": limits.kl,
            "entropy": limits.entropy_share,
            "response_length": limits.length_ratio,
            "repetition": limits.repetition,
            "end_share": limits.end_share_drop,
            "judge": limits.judge_drop,
        }
        for name, setting in settings.items():
            if setting is None or name not in metrics:
                continue
            value = metrics[name]
            if not math.isfinite(value):
                yield Alert(name, value, setting, f"{name} is {value}: not a finite number"), True
            elif name in ("kl", "repetition"):
                message = f"{_LABELS[name]} {value:.4g} is above its limit of {setting:.4g}: {_MEANINGS[name]}"
                yield Alert(name, value, setting, message), value > setting
            elif name == "entropy":
                yield self._entropy(value, setting)
            elif name == "response_length":
                yield self._length(value, setting)
            elif name == "end_share":
                yield self._end_share(value, setting)
            elif self._latest_reward is not None:
                yield self._judge(value, setting, self._latest_reward)

    def _entropy(self, value: float, share: float) -> tuple[Alert, bool]:
        start = self._first["entropy"]
        fell = f"entropy {value:.4g} fell below {100 * share:.4g}% of its start ({start:.4g})"
        message = f"{fell}: the policy may be collapsing"
        return Alert("entropy", value, share * start, message), value < share * start

    def _length(self, value: float, ratio: float) -> tuple[Alert, bool]:
        start = self._first["response_length"]
        shortest, longest = start / ratio, start * ratio
        limit = longest if value > start else shortest
        message = (
            f"mean length {value:.4g} left the range {shortest:.4g}–{longest:.4g} around its start ({start:.4g} tokens)"
        )
        return Alert("response_length", value, limit, message), not shortest <= value <= longest

    def _end_share(self, value: float, drop: float) -> tuple[Alert, bool]:
        start = self._first["end_share"]
        limit = start - drop
        message = (
            f"the share of finished responses, {value:.4g}, fell more than {drop:.4g} below its start ({start:.4g}): "
            "responses are cut off"
        )
        return Alert("end_share", value, limit, message), value < limit

    def _judge(self, value: float, drop: float, reward: float) -> tuple[Alert, bool]:
        """Reward hacking: what is trained on rises while what it stands for falls (Gao et al. 2023, figure 1)."""
        assert self._best_judge is not None, "a finite judge was taken as the best one"
        start = self._first["reward"]
        limit = self._best_judge - drop
        message = (
            f"reward rose from {start:.4g} to {reward:.4g} while the judge fell to {value:.4g}, more than {drop:.4g} "
            f"below its best ({self._best_judge:.4g}): the policy may be exploiting the reward model"
        )
        return Alert("judge", value, limit, message), reward > start and value < limit
