"""What report.md says of a policy: reward and KL by iteration, best-of-n beside it, answers before and after.

Enters: a run's folder and events ("rollout", "best_of_n", "alarm") and its samples.jsonl. Leaves: sections of Markdown,
and `curves/frontier.svg`. Left out: measuring.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.evaluation.frontier import FrontierPoint, frontier_svg
from loopos.evaluation.markdown import cell, number, shown, table
from loopos.storage.durable import write_whole

_SHOWN = (
    "reward",
    "kl",
    "entropy",
    "response_length",
    "end_share",
    "repetition",
    "kl_coefficient",
    "explained_variance",
)
_MOST_ITERATIONS_LISTED = 40
_SAMPLES = 3


def policy_sections(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sections of a run with rollouts; none for another."""
    rollouts = [event["metrics"] for event in events if event["event"] == "rollout"]
    if not rollouts:
        return []
    stride = math.ceil(len(rollouts) / _MOST_ITERATIONS_LISTED)
    listed = rollouts[::-1][::stride][::-1]
    names = [name for name in _SHOWN if any(name in rollout for rollout in listed)]
    rows = [(str(each["iteration"] + 1), *(_figure(each.get(name)) for name in names)) for each in listed]
    parts = ["## Iterations", table(("iteration", *names), rows)]
    best = [event["metrics"] for event in events if event["event"] == "best_of_n"]
    parts += _frontier(run_dir, rollouts, best)
    alarms = [event for event in events if event["event"] == "alarm"]
    if alarms:
        rows = [
            (
                str(each["step"]),
                each["metrics"]["name"],
                _figure(each["metrics"]["value"]),
                _figure(each["metrics"]["limit"]),
            )
            for each in alarms
        ]
        parts += ["## Alarms", table(("step", "guard", "value", "limit"), rows)]
    return [*parts, *_samples(run_dir / "samples.jsonl")]


def _figure(value: object) -> str:
    found = number(value)
    return "" if found is None else shown(found)


def _frontier(run_dir: Path, rollouts: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reward over KL, and best-of-n as the baseline that needs no training."""
    path = [FrontierPoint(f"iteration {each['iteration'] + 1}", each["kl"], each["reward"]) for each in rollouts]
    points = [FrontierPoint(f"best of {each['n']}", each["kl"], each["reward"]) for each in best]
    if not any(math.isfinite(point.kl) and math.isfinite(point.reward) for point in path):
        return []
    (run_dir / "curves").mkdir(exist_ok=True)
    write_whole(run_dir / "curves" / "frontier.svg", frontier_svg(path, best_of_n=points).encode())
    parts = ["## Reward over KL", "![frontier](curves/frontier.svg)"]
    if best:
        rows = [
            (str(each["n"]), _figure(each["kl"]), _figure(each["reward"]), _figure(each.get("judge"))) for each in best
        ]
        parts += [
            "Best of n answers of the first policy, by the reward, on the validation prompts (KL: log n − (n − 1)/n).",
            table(("n", "kl", "reward", "judge"), rows),
        ]
    return parts


def _samples(file: Path) -> list[str]:
    """The same prompts answered before training and last."""
    if not file.is_file():
        return []
    told = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = sorted({each["step"] for each in told})
    if len(steps) < 2:
        return []
    first, last = ([each for each in told if each["step"] == step] for step in (steps[0], steps[-1]))
    parts = ["## Answers before and after"]
    for before, after in list(zip(first, last, strict=False))[:_SAMPLES]:
        rows = [
            (name, shown(each["reward"]), cell(each["response"]))
            for name, each in (("before", before), ("after", after))
        ]
        parts += [f"> {cell(before['prompt'])}", table(("", "reward", "answer"), rows)]
    return parts
