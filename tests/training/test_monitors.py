"""Alerts of hand-made runs: when each is raised, its message, and that a resumed run raises the same."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from loopos.rl.monitors import Alert, Monitor, MonitorLimits

ALL = MonitorLimits(
    kl=10.0,
    entropy_share=0.25,
    length_ratio=2.0,
    repetition=0.5,
    eos_rate_drop=0.25,
    judge_drop=0.5,
    patience=1,
)


def alerts(limits: MonitorLimits, *iterations: dict[str, float]) -> list[list[Alert]]:
    guards = Monitor(limits)
    return [guards.observe(metrics) for metrics in iterations]


def sounded(limits: MonitorLimits, name: str, values: list[float]) -> list[int]:
    """The iterations, from 0, with an alert of a metric; no other alert may be raised."""
    found = alerts(limits, *({name: value} for value in values))
    assert all(alert.name == name for now in found for alert in now)
    return [index for index, now in enumerate(found) if now]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # A value at the limit is within it.
        ("kl", [10.0, 10.5], [1]),
        ("kl", [11.0], [0]),
        ("repetition", [0.1, 0.5, 0.51], [2]),
        ("entropy", [4.0, 1.0, 0.99], [2]),
        ("response_length", [100, 200, 201], [2]),
        ("response_length", [100, 50, 49], [2]),
        ("eos_rate", [0.75, 0.5, 0.49], [2]),
        # The first values count, not the largest or the last.
        ("entropy", [2.0, 8.0, 1.0, 0.4], [3]),
        ("eos_rate", [0.5, 1.0, 0.5, 0.2], [3]),
        # One alert for each time beyond the limit.
        ("kl", [11, 12, 9, 13, 14, 15, 1, 11], [0, 3, 7]),
        ("response_length", [100, 201, 202, 100, 40], [1, 4]),
        ("entropy", [4.0, math.nan, 4.0, math.inf], [1, 3]),
        ("kl", [math.nan, 1.0], [0]),
    ],
)
def test_each_limit(name: str, values: list[float], expected: list[int]) -> None:
    assert sounded(ALL, name, values) == expected


def test_patience_counts_iterations_in_a_row() -> None:
    limits = MonitorLimits(kl=10.0, patience=3)
    assert sounded(limits, "kl", [11, 11, 9, 11, 11, 11, 11, 11, 11, 9, 11, 11, 11]) == [5, 12]


def test_a_reward_hacking_alert_needs_a_risen_reward_and_a_fallen_judge() -> None:
    iterations = [
        {"reward": 1.0, "judge": 5.0},
        {"reward": 2.0, "judge": 7.0},
        # 0.5 under its best is within the limit, though above its first.
        {"reward": 3.0, "judge": 6.5},
        {"reward": 0.5, "judge": 4.0},
        {"reward": 4.0, "judge": 6.25},
    ]
    found = alerts(ALL, *iterations)
    assert [len(now) for now in found] == [0, 0, 0, 0, 1]
    (alert,) = found[4]
    assert (alert.name, alert.value, alert.limit) == ("judge", 6.25, 6.5)
    assert alert.message == (
        "reward rose from 1 to 4 while the judge fell to 6.25, more than 0.5 below its best (7): "
        "the policy may be exploiting the reward model"
    )


def test_an_iteration_that_does_not_measure_a_metric_changes_nothing() -> None:
    limits = MonitorLimits(judge_drop=0.5, kl=10.0, patience=2)
    found = alerts(
        limits,
        {"reward": 1.0, "kl": 1.0},
        {"reward": 2.0, "judge": 7.0},
        {"reward": 3.0, "judge": 6.0},
        {"reward": 3.0, "kl": 11.0},
        {"reward": 3.0},
        {"reward": 3.0, "judge": 6.0, "kl": 11.0},
    )
    assert [[alert.name for alert in now] for now in found] == [[], [], [], [], [], ["kl", "judge"]]


def test_a_judge_measured_separately_is_compared_with_the_latest_reward() -> None:
    found = alerts(
        ALL,
        {"judge": 9.0},
        {"judge": 7.0},
        {"reward": 1.0},
        {"judge": 7.0},
        {"reward": 2.0},
        {"judge": 6.0},
        {"reward": 0.0},
        {"judge": 6.0},
        {"reward": 3.0},
        {"judge": 6.0},
    )
    assert [index for index, now in enumerate(found) if now] == [5, 9]
    assert "from 1 to 3 while the judge fell to 6, more than 0.5 below its best (9)" in found[9][0].message


def test_alerts_contain_their_numbers() -> None:
    first = {"kl": 0.0, "entropy": 4.0, "response_length": 100, "repetition": 0.0, "eos_rate": 0.75}
    last = {"kl": 12.5, "entropy": 0.5, "response_length": 300, "repetition": 0.75, "eos_rate": 0.25}
    before, found = alerts(ALL, first, last)
    assert before == []
    assert [(alert.name, alert.value, alert.limit, alert.message) for alert in found] == [
        ("kl", 12.5, 10.0, "KL 12.5 is above its limit of 10: the policy moves far from its reference"),
        ("entropy", 0.5, 1.0, "entropy 0.5 fell below 25% of its start (4): the policy may be collapsing"),
        ("response_length", 300, 200, "mean length 300 left the range 50–200 around its start (100 tokens)"),
        ("repetition", 0.75, 0.5, "repetition 0.75 is above its limit of 0.5: responses repeat themselves"),
        (
            "eos_rate",
            0.25,
            0.5,
            "the fraction of finished responses, 0.25, fell more than 0.25 below its start (0.75): responses are cut off",
        ),
    ]
    (short,) = alerts(ALL, {"response_length": 100}, {"response_length": 20})[1]
    assert short.message == "mean length 20 left the range 50–200 around its start (100 tokens)"
    assert short.limit == 50


def test_without_limits_there_is_no_alert() -> None:
    wild = {"kl": 1e9, "entropy": 0.0, "response_length": 1e9, "repetition": 1.0, "eos_rate": 0.0, "judge": -1e9}
    tame = {"kl": 0.0, "entropy": 4.0, "response_length": 10, "repetition": 0.0, "eos_rate": 1.0, "judge": 0.0}
    assert alerts(MonitorLimits(), {"reward": 0.0, **tame}, {"reward": 1.0, **wild}) == [[], []]
    assert len(alerts(ALL, {"reward": 0.0, **tame}, {"reward": 1.0, **wild})[1]) == 6


def test_a_resumed_run_raises_the_same_alerts() -> None:
    limits = MonitorLimits(kl=0.75, entropy_share=0.5, length_ratio=1.5, eos_rate_drop=0.1, judge_drop=0.2, patience=2)
    run = [
        {
            "kl": (7 * index % 5) / 2,
            "entropy": 1 / (1 + index % 4),
            "response_length": 10.0 + 3 * (index % 5),
            "eos_rate": 1 - (index % 3) / 10,
            "reward": index / 7,
            "judge": math.sin(index / 2),
        }
        for index in range(24)
    ]
    # The judge is measured separately, in every second iteration.
    run = [
        part
        for index, metrics in enumerate(run)
        for part in ({name: metrics[name] for name in metrics if name != "judge"}, {"judge": metrics["judge"]})
        if index % 2 or "reward" in part
    ]
    whole = alerts(limits, *run)
    assert {alert.name for now in whole for alert in now} == {"kl", "entropy", "response_length", "judge"}
    for cut in range(len(run)):
        first, second = Monitor(limits), Monitor(limits)
        before = [first.observe(metrics) for metrics in run[:cut]]
        second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert before + [second.observe(metrics) for metrics in run[cut:]] == whole, cut


def test_a_state_is_a_copy() -> None:
    guards = Monitor(ALL)
    guards.observe({"entropy": 4.0})
    state = guards.state()
    other = Monitor(ALL)
    other.load(state)
    other.observe({"kl": 11.0, "reward": 1.0, "judge": 1.0})
    assert guards.state() == state
    assert state == {"first": {"entropy": 4.0}, "best_judge": None, "latest_reward": None, "streaks": {"entropy": 0}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl", -1.0),
        ("kl", math.nan),
        ("entropy_share", 1.5),
        ("length_ratio", 0.5),
        ("repetition", 2.0),
        ("eos_rate_drop", -0.1),
        ("judge_drop", math.inf),
        ("patience", 0),
    ],
)
def test_limits_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        MonitorLimits(**{name: value})
