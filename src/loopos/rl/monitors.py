"""Monitors of an RL run: alerts when the policy leaves its reference, collapses, or exploits the reward model.

Input per iteration: kl (nats to the reference), entropy (nats), response_length (tokens), repetition and eos_rate
(fractions), reward (of the trained reward model), judge (a reward model that training does not use). `methods` decides
what follows from an alert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopos.storage.events import current_metric

_LABELS = {"kl": "KL", "repetition": "repetition"}
_MEANINGS = {"kl": "the policy moves far from its reference", "repetition": "responses repeat themselves"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorLimits:
    """Limits of a run; None disables a limit. "First" is a metric's first measured value.

    `kl`: maximum in nats. `entropy_share`: minimum fraction of the first entropy. `length_ratio`: lengths must stay
    between first / ratio and first · ratio. `repetition`: maximum. `eos_rate_drop`: maximum drop of eos_rate below
    its first value. `judge_drop`: maximum drop of the judge below its best, in its own unit, while the reward is above
    its first value. `patience`: consecutive iterations beyond a limit before an alert. Raises ValueError for limits
    that every run or no run would meet.
    """

    kl: float | None = None
    entropy_share: float | None = None
    length_ratio: float | None = None
    repetition: float | None = None
    eos_rate_drop: float | None = None
    judge_drop: float | None = None
    patience: int = 1

    def __post_init__(self) -> None:
        highest = {"entropy_share": 1.0, "repetition": 1.0, "eos_rate_drop": 1.0}
        for name in ("kl", "entropy_share", "length_ratio", "repetition", "eos_rate_drop", "judge_drop"):
            limit = getattr(self, name)
            least, most = 1.0 if name == "length_ratio" else 0.0, highest.get(name, math.inf)
            if limit is not None and not (math.isfinite(limit) and least <= limit <= most):
                raise ValueError(f"{name}: got {limit}; expected a number from {least:g} to {most:g}")
        if self.patience < 1:
            raise ValueError(f"patience: got {self.patience}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Alert:
    """Metric `name` has a `value` beyond `limit`; `message` explains it."""

    name: str
    value: float
    limit: float
    message: str

    def as_json(self) -> dict[str, Any]:
        """The alert for the log."""
        return {"name": self.name, "value": self.value, "limit": self.limit, "message": self.message}


class Monitor:
    """Monitors one run. Metrics that an iteration does not measure leave their alerts unchanged: a judge that runs
    every tenth iteration is compared with the latest reward.
    """

    def __init__(self, limits: MonitorLimits) -> None:
        self.limits = limits
        self._first: dict[str, float] = {}
        self._best_judge: float | None = None
        self._latest_reward: float | None = None
        # Consecutive iterations beyond the limit, by alert name.
        self._streaks: dict[str, int] = {}

    def observe(self, metrics: Mapping[str, float]) -> list[Alert]:
        """Records one iteration's metrics, the first of which are the baseline; returns new alerts. A persistent alert
        is not repeated until its metric has been within the limit again. nan and inf are beyond every limit.
        """
        for name in ("entropy", "response_length", "eos_rate", "reward"):
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
        """State for a checkpoint, as JSON."""
        return {
            "first": dict(self._first),
            "best_judge": self._best_judge,
            "latest_reward": self._latest_reward,
            "streaks": dict(self._streaks),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`, also that of an older version, with other names of metrics."""
        for own, saved in ((self._first, state["first"]), (self._streaks, state["streaks"])):
            own.clear()
            own.update((current_metric(name), value) for name, value in saved.items())
        self._best_judge, self._latest_reward = state["best_judge"], state["latest_reward"]

    def _checks(self, metrics: Mapping[str, float]) -> Iterator[tuple[Alert, bool]]:
        """Every enabled alert whose metric was measured, and whether its limit is exceeded."""
        limits = self.limits
        settings = {
            "kl": limits.kl,
            "entropy": limits.entropy_share,
            "response_length": limits.length_ratio,
            "repetition": limits.repetition,
            "eos_rate": limits.eos_rate_drop,
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
            elif name == "eos_rate":
                yield self._eos_rate(value, setting)
            elif self._latest_reward is not None:
                yield self._judge(value, setting, self._latest_reward)

    def _entropy(self, value: float, ratio: float) -> tuple[Alert, bool]:
        start = self._first["entropy"]
        fell = f"entropy {value:.4g} fell below {100 * ratio:.4g}% of its start ({start:.4g})"
        message = f"{fell}: the policy may be collapsing"
        return Alert("entropy", value, ratio * start, message), value < ratio * start

    def _length(self, value: float, ratio: float) -> tuple[Alert, bool]:
        start = self._first["response_length"]
        shortest, longest = start / ratio, start * ratio
        limit = longest if value > start else shortest
        message = (
            f"mean length {value:.4g} left the range {shortest:.4g}–{longest:.4g} around its start ({start:.4g} tokens)"
        )
        return Alert("response_length", value, limit, message), not shortest <= value <= longest

    def _eos_rate(self, value: float, drop: float) -> tuple[Alert, bool]:
        start = self._first["eos_rate"]
        limit = start - drop
        message = (
            f"the fraction of finished responses, {value:.4g}, fell more than {drop:.4g} below its start "
            f"({start:.4g}): responses are cut off"
        )
        return Alert("eos_rate", value, limit, message), value < limit

    def _judge(self, value: float, drop: float, reward: float) -> tuple[Alert, bool]:
        """Reward hacking: the trained reward rises while the independent judge falls (Gao et al. 2023, figure 1)."""
        assert self._best_judge is not None, "observe stores the first finite judge as the best"
        start = self._first["reward"]
        limit = self._best_judge - drop
        message = (
            f"reward rose from {start:.4g} to {reward:.4g} while the judge fell to {value:.4g}, more than {drop:.4g} "
            f"below its best ({self._best_judge:.4g}): the policy may be exploiting the reward model"
        )
        return Alert("judge", value, limit, message), reward > start and value < limit
