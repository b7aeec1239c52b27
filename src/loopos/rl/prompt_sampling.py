"""Which prompts an iteration trains on: a curriculum by pass rate, and other prompts in place of those whose responses
all have the same score (dynamic sampling: Yu et al. 2025, section 3.2).

Both draw from counted random numbers, so that every process and a resumed run draw the same prompts. Apart from
`rollouts`, which plans without having seen a score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopos.config.rl import CurriculumSection
from loopos.rl.collector import Rollout
from loopos.rl.reward_metrics import judged
from loopos.rl.rollouts import RolloutPlan


class Curriculum:
    """Draws prompts by how often the policy solves them: a prompt with the pass rate p has the weight
    max(4p(1 − p), floor), one that was never drawn 1. p is a moving average over the times that it was drawn.
    """

    def __init__(self, section: CurriculumSection, *, num_prompts: int, seed: int) -> None:
        self.section, self.num_prompts, self.seed = section, num_prompts, seed
        self.pass_rates: dict[int, float] = {}

    def weight(self, prompt: int) -> float:
        """The weight of a prompt among the others."""
        rate = self.pass_rates.get(prompt)
        return 1.0 if rate is None else max(4.0 * rate * (1.0 - rate), self.section.floor)

    def choose(self, iteration: int, number: int) -> list[int]:
        """So many prompts for an iteration, without repetition while there are others (Efraimidis and Spirakis
        2006).
        """
        # The fifth number separates these draws from those of `RolloutPlan`.
        random = np.random.Generator(np.random.PCG64([self.seed, iteration, 0, 0, 1]))
        weights = np.array([self.weight(prompt) for prompt in range(self.num_prompts)])
        order = np.argsort(random.exponential(size=self.num_prompts) / weights, kind="stable").tolist()
        return [order[position % len(order)] for position in range(number)]

    def observe(self, prompt: int, scores: Sequence[float]) -> None:
        """Takes the scores of the responses to a prompt that a reward judged into its pass rate."""
        known = judged(scores)
        if not known:
            return
        passed = sum(score >= self.section.pass_score for score in known) / len(known)
        earlier = self.pass_rates.get(prompt)
        weight = 0.0 if earlier is None else self.section.decay
        self.pass_rates[prompt] = weight * (earlier or 0.0) + (1.0 - weight) * passed

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: [prompt, pass rate] pairs."""
        return {"pass_rates": sorted(self.pass_rates.items())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`."""
        self.pass_rates = {int(prompt): rate for prompt, rate in state["pass_rates"]}


@dataclass(frozen=True)
class Drawn:
    """The rollouts of an iteration. `first`: as the prompts of the iteration gave them; `trained`: with groups that
    replace those without signal; `redrawn`: groups that were generated in addition. `groups`: of each group that was
    generated the prompt and the scores, in order.
    """

    first: list[Rollout]
    trained: list[Rollout]
    redrawn: int
    groups: list[tuple[int, list[float]]]


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether the responses to a prompt that a reward judged have different scores."""
    return len(set(judged([rollout.score for rollout in group]))) > 1


def no_signal_fraction(rollouts: Sequence[Rollout], size: int) -> float:
    """The fraction of groups of `size` responses whose scores are all the same."""
    groups = _groups(rollouts, size)
    return sum(not has_signal(group) for group in groups) / len(groups)


def draw(
    generate: Callable[[Sequence[int], int], list[Rollout]],
    prompts: Sequence[int],
    plan: RolloutPlan,
    *,
    iteration: int,
    attempts: int,
) -> Drawn:
    """Generates the responses to an iteration's prompts, and at most `attempts` times those to other prompts in place
    of prompts whose responses all have the same score.

    generate: (number of each response's prompt, attempt from 0) → a rollout for each, the same on every process.
    prompts: of each response. Groups for which no other with signal was found stay as they are.
    """
    size = plan.responses_per_prompt
    first = generate(prompts, 0)
    groups, numbers = _groups(first, size), list(prompts[::size])
    seen = [(number, [rollout.score for rollout in group]) for number, group in zip(numbers, groups, strict=True)]
    redrawn = 0
    for attempt in range(1, attempts + 1):
        flat = [index for index, group in enumerate(groups) if not has_signal(group)]
        if not flat:
            break
        others = plan.other_prompts(iteration, attempt, {number for number, _ in seen}, len(flat))
        found = _groups(generate([number for number in others for _ in range(size)], attempt), size)
        redrawn += len(found)
        seen += [(number, [rollout.score for rollout in group]) for number, group in zip(others, found, strict=True)]
        useful = [group for group in found if has_signal(group)]
        for index, group in zip(flat, useful, strict=False):
            groups[index] = group
    return Drawn(first, [rollout for group in groups for rollout in group], redrawn, seen)


def _groups(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    return [list(rollouts[start : start + size]) for start in range(0, len(rollouts), size)]
