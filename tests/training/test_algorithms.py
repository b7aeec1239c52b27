"""Each algorithm's loss and gradient against its formula, worked here response by response on fixed rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loopos.config.algorithms import ALGORITHMS
from loopos.config.rl import PpoTrainingSection
from loopos.data.batches import Cursor
from loopos.functional.advantages import overlong_penalty, relative_rewards
from loopos.functional.packing import PackedLayout
from loopos.rl.algorithms import Algorithm
from loopos.rl.experience import AdvantageSettings, Experience, experience_of
from loopos.rl.objective import PpoObjective
from loopos.rl.rollouts import RolloutPlan

# Two prompts with three responses each; the second prompt's scores are all the same.
PROMPTS = [[1, 2], [1, 2], [1, 2], [3], [3], [3]]
LENGTHS = (3, 1, 2, 2, 4, 1)
SCORES = (1.0, 0.0, 0.5, 2.0, 2.0, 2.0)
ENDED = (True, True, False, True, False, True)
MAX_NEW_TOKENS = 5
NUM_TOKENS = sum(LENGTHS)
STARTS = [sum(LENGTHS[:index]) for index in range(len(LENGTHS))]


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    ended: bool
    mask: list[bool] | None = None


@dataclass(frozen=True)
class Judged:
    response: Tokens
    score: float
    logprobs: Tensor
    engine_logprobs: Tensor
    reference_logprobs: Tensor | None
    values: Tensor | None = None
    staleness: int = 0


@dataclass
class Table:
    """A policy whose parameters are the log-probabilities of the tokens: token number k of the rollouts is the id k."""

    logprobs: Tensor

    def __call__(self, ids: Tensor, layout: PackedLayout, positions: Tensor, targets: Tensor) -> Any:
        # Each position predicts the token behind it, in the order of the layout.
        found = self.logprobs[targets - 100]
        return found, -found, None


def tables() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    old = -torch.rand(NUM_TOKENS, generator=random) - 0.5
    # Ratios far enough from 1 that either side of every clip is reached.
    return {
        "old": old,
        "new": old + torch.randn(NUM_TOKENS, generator=random) * 0.4,
        "reference": old + torch.randn(NUM_TOKENS, generator=random) * 0.3,
    }


def section(name: str, **training: Any) -> PpoTrainingSection:
    defaults = {key.partition(".")[2]: value for key, value in ALGORITHMS[name].defaults.items() if "training" in key}
    return PpoTrainingSection.model_validate({"learning_rate": 1e-6, "algorithm": name, **defaults, **training})


def experience(settings: PpoTrainingSection) -> Experience:
    values = tables()
    has_reference = settings.kl_coefficient > 0
    rows = [
        Judged(
            Tokens(list(range(100 + start, 100 + start + length)), ended),
            score,
            values["old"][start : start + length],
            values["old"][start : start + length],
            values["reference"][start : start + length] if has_reference else None,
        )
        for start, length, score, ended in zip(STARTS, LENGTHS, SCORES, ENDED, strict=True)
    ]
    algorithm = Algorithm.of(settings.algorithm, ALGORITHMS[settings.algorithm])
    how = AdvantageSettings.of(settings, algorithm, responses_per_prompt=3)
    return experience_of(
        PROMPTS, rows, old_logprobs="forward", kl_coefficient=settings.kl_coefficient, settings=how
    )  # fmt: skip


def loss_of(
    settings: PpoTrainingSection, batches: Sequence[Sequence[int]], *, share: bool = False
) -> tuple[float, Tensor]:
    """The loss and the gradient of the log-probabilities, over these micro-batches."""
    table = Table(tables()["new"].requires_grad_(True))
    algorithm = Algorithm.of(settings.algorithm, ALGORITHMS[settings.algorithm])
    objective = PpoObjective.of(settings, table, algorithm, max_new_tokens=MAX_NEW_TOKENS)
    rows = experience(settings).rows(torch.device("cpu"), share_prompts=share)
    made = [rows(batch) for batch in batches]
    counts = {name: sum(objective.counts(batch)[name] for batch in made) for name in objective.counts(made[0])}
    weights = objective.weights
    sums = [objective.loss(batch) for batch in made]
    loss = sum(weights[name] * each[name] / counts[name] for each in sums for name in weights)
    assert isinstance(loss, Tensor)
    return float(loss.detach()), torch.autograd.grad(loss, table.logprobs)[0]


Rows = list[Tensor]


def by_response(values: Tensor) -> Rows:
    return [values[start : start + length] for start, length in zip(STARTS, LENGTHS, strict=True)]


def group_advantages(*, scaled: bool, kl: Sequence[float] = (0.0,) * 6, leave_one_out: bool = False) -> list[float]:
    found = []
    for group in (range(3), range(3, 6)):
        rewards = [SCORES[row] - kl[row] for row in group]
        mean = sum(rewards) / 3
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 2)
        for reward in rewards:
            baseline = (sum(rewards) - reward) / 2 if leave_one_out else mean
            found.append((reward - baseline) / (std + 1e-4 if scaled else 1.0))
    return found


def clipped(ratio: Tensor, advantage: Tensor | float, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def token_clipped(new: Rows, old: Rows, advantages: Sequence[float], low: float, high: float) -> list[Tensor]:
    return [clipped((n - o).exp(), a, low, high) for n, o, a in zip(new, old, advantages, strict=True)]


def grpo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    losses = token_clipped(new, old, group_advantages(scaled=True), 0.2, 0.2)
    return torch.stack([loss.mean() for loss in losses]).mean()


def dr_grpo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    losses = token_clipped(new, old, group_advantages(scaled=False), 0.2, 0.2)
    return torch.cat(losses).sum() / (6 * MAX_NEW_TOKENS)


def dapo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    return torch.cat(token_clipped(new, old, group_advantages(scaled=True), 0.2, 0.28)).mean()


def rloo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    kl = [0.05 * float((o - r).sum()) for o, r in zip(old, reference, strict=True)]
    advantages = group_advantages(scaled=False, kl=kl, leave_one_out=True)
    ratios = [(n.sum() - o.sum()).exp() for n, o in zip(new, old, strict=True)]
    return torch.stack([clipped(ratio, a, 0.2, 0.2) for ratio, a in zip(ratios, advantages, strict=True)]).mean()


def gspo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    advantages = group_advantages(scaled=True)
    ratios = [(n - o).mean().exp() for n, o in zip(new, old, strict=True)]
    return torch.stack([clipped(ratio, a, 3e-4, 4e-4) for ratio, a in zip(ratios, advantages, strict=True)]).mean()


def cispo(new: Rows, old: Rows, reference: Rows) -> Tensor:
    losses = []
    for n, o, a in zip(new, old, group_advantages(scaled=True), strict=True):
        losses.append(-(n - o).exp().detach().clamp(max=5.0) * a * n)
    return torch.cat(losses).mean()


def _whitened(advantages: list[Tensor]) -> list[Tensor]:
    every = torch.cat(advantages)
    return [(each - every.mean()) / (every.var() + 1e-8).sqrt() for each in advantages]


def reinforce_pp(new: Rows, old: Rows, reference: Rows) -> Tensor:
    advantages = []
    for o, r, score in zip(old, reference, SCORES, strict=True):
        rewards = -0.01 * (o - r)
        rewards[-1] += score
        advantages.append(torch.stack([rewards[t:].sum() for t in range(len(o))]))
    losses = [
        clipped((n - o).exp(), a, 0.2, 0.2) for n, o, a in zip(new, old, _whitened(advantages), strict=True)
    ]  # fmt: skip
    return torch.cat(losses).mean()


def reinforce_pp_baseline(new: Rows, old: Rows, reference: Rows) -> Tensor:
    flat = [torch.full((n,), a) for n, a in zip(LENGTHS, group_advantages(scaled=False), strict=True)]
    losses = [clipped((n - o).exp(), a, 0.2, 0.2) for n, o, a in zip(new, old, _whitened(flat), strict=True)]
    kl = torch.cat([0.5 * (n - r).square() for n, r in zip(new, reference, strict=True)])
    return torch.cat(losses).mean() + 0.01 * kl.mean()


FORMULAS: dict[str, Callable[[Rows, Rows, Rows], Tensor]] = {
    "grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "rloo": rloo, "gspo": gspo, "cispo": cispo,
    "reinforce_pp": reinforce_pp, "reinforce_pp_baseline": reinforce_pp_baseline,
}  # fmt: skip


def expected_of(formula: Callable[[Rows, Rows, Rows], Tensor]) -> tuple[float, Tensor]:
    values = tables()
    new = values["new"].requires_grad_(True)
    loss = formula(*(by_response(each) for each in (new, values["old"], values["reference"])))
    return float(loss.detach()), torch.autograd.grad(loss, new)[0]


def check(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    assert float(expected[1].abs().max()) > 1e-3


def test_every_algorithm_has_its_formula_here() -> None:
    built_in = [name for name in ALGORITHMS if ALGORITHMS.source(name) == "loopos"]
    assert set(FORMULAS) == set(built_in) - {"ppo"}


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5]], [[5, 0], [3, 1, 4], [2]]], ids=["one pass", "three passes"])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_follow_the_formula(name: str, batches: list[list[int]]) -> None:
    check(loss_of(section(name), batches), expected_of(FORMULAS[name]))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_shared_prompt_changes_nothing(name: str) -> None:
    order = [4, 0, 2, 1, 5, 3]
    check(loss_of(section(name), [order], share=True), loss_of(section(name), [order]))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_a_kl_in_the_loss_has_the_normalization_of_the_policy_loss(estimator: str, normalization: str) -> None:
    def formula(new: Rows, old: Rows, reference: Rows) -> Tensor:
        losses = token_clipped(new, old, group_advantages(scaled=True), 0.2, 0.2)
        for index, (n, r) in enumerate(zip(new, reference, strict=True)):
            kl = 0.5 * (n - r).square() if estimator == "k2" else (r - n).exp() - (r - n) - 1
            losses[index] = losses[index] + 0.1 * kl
        if normalization == "token":
            return torch.cat(losses).mean()
        if normalization == "sequence":
            return torch.stack([loss.mean() for loss in losses]).mean()
        return torch.cat(losses).sum() / (6 * MAX_NEW_TOKENS)

    training = {"kl_coefficient": 0.1, "kl_estimator": estimator, "loss_normalization": normalization}
    check(loss_of(section("grpo", **training), [[0, 3, 1], [2, 4, 5]]), expected_of(formula))


def test_dual_clip_bounds_the_ratio_of_bad_tokens_and_the_entropy_is_a_mean_over_tokens() -> None:
    def formula(new: Rows, old: Rows, reference: Rows) -> Tensor:
        losses = []
        for n, o, a in zip(new, old, group_advantages(scaled=True), strict=True):
            ratio = (n - o).exp()
            losses.append(-torch.minimum(ratio.clamp(max=1.25) * a, ratio.clamp(0.8, 1.2) * a).mean())
        # The table's entropies are −log π.
        return torch.stack(losses).mean() - 0.3 * -torch.cat(new).mean()

    training = {"dual_clip": 1.25, "entropy_coefficient": 0.3}
    check(loss_of(section("grpo", **training), [[0, 3, 1], [2, 4, 5]]), expected_of(formula))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_truncated_responses_count_nowhere(normalization: str) -> None:
    """Their scores are part of the baseline all the same."""

    def formula(new: Rows, old: Rows, reference: Rows) -> Tensor:
        losses = token_clipped(new, old, group_advantages(scaled=True), 0.2, 0.2)
        kept = [loss for loss, ended in zip(losses, ENDED, strict=True) if ended]
        if normalization == "token":
            return torch.cat(kept).mean()
        if normalization == "sequence":
            return torch.stack([loss.mean() for loss in kept]).mean()
        return torch.cat(kept).sum() / (len(kept) * MAX_NEW_TOKENS)

    settings = section("grpo", mask_truncated=True, loss_normalization=normalization)
    check(loss_of(settings, [[0, 2], [5, 4, 3, 1]]), expected_of(formula))
    stored = experience(settings)
    again = Experience.of_tensors(stored.tensors(), 0.0, is_own=True)
    assert again.learned == list(ENDED)
    # Where nothing is masked, the checkpoint is that of older versions.
    assert "learned" not in experience(section("grpo")).tensors()


def test_a_minibatch_of_only_truncated_responses_has_no_loss() -> None:
    settings = section("grpo", mask_truncated=True)
    objective = PpoObjective.of(
        settings, Table(tables()["new"]), Algorithm.of("grpo", ALGORITHMS["grpo"]), max_new_tokens=MAX_NEW_TOKENS
    )
    batch = experience(settings).rows(torch.device("cpu"))([2, 4])
    assert set(objective.counts(batch).values()) == {0.0}
    assert all(float(value.detach()) == 0.0 for value in objective.loss(batch).values())


def test_baselines_and_scales() -> None:
    rewards, groups = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1])
    cases = {
        ("group", "none"): [-1.0, 1.0, -1.0, 1.0],
        ("leave_one_out", "none"): [-2.0, 2.0, -2.0, 2.0],
        ("batch", "none"): [-3.0, -1.0, 1.0, 3.0],
        ("none", "none"): [1.0, 3.0, 5.0, 7.0],
        # √2 and √(20/3) are the deviations with Bessel's correction.
        ("group", "group"): [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)] * 2,
        ("batch", "batch"): [value / ((20 / 3) ** 0.5 + 1e-4) for value in (-3.0, -1.0, 1.0, 3.0)],
    }
    for (baseline, scale), expected in cases.items():
        found = relative_rewards(rewards, groups, baseline=baseline, scale=scale)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(expected), (baseline, scale)
    # No signal in a group of equal rewards, and none in a group of one.
    assert (
        relative_rewards(
            torch.tensor([2.0, 2.0, 9.0]), torch.tensor([0, 0, 1]), baseline="leave_one_out", scale="group"
        ).tolist()
        == [0.0] * 3
    )


def test_the_soft_penalty_of_long_responses() -> None:
    """DAPO's own example in small: 16 of 20 tokens are free, 4 are the buffer."""
    found = [overlong_penalty(length, longest=20, buffer=4) for length in (1, 16, 17, 19, 20)]
    assert found == [0.0, 0.0, 0.25, 0.75, 1.0]


def plan(**sizes: Any) -> RolloutPlan:
    given = {"num_prompts": 7, "batch_size": 12, "inner_epochs": 2, "minibatches": 2, "accumulation": 1, "rank": 0}
    return RolloutPlan(**{**given, "world": 1, "seed": 3, "responses_per_prompt": 3, **sizes})


def test_a_group_stays_in_one_minibatch_and_one_pass() -> None:
    lengths = [5] * 12
    for step in range(4):
        (batch,) = plan().response_batches(Cursor(0, step), lengths)
        assert len(batch) == 6
        assert [batch[start : start + 3] for start in (0, 3)] == [
            [batch[start] // 3 * 3 + index for index in range(3)] for start in (0, 3)
        ]
    # More passes than groups: they are split, and each response is in one pass.
    split = plan(accumulation=4).response_batches(Cursor(0, 0), lengths)
    assert len(split) == 4
    whole = plan().response_batches(Cursor(0, 0), lengths)
    assert sorted(row for batch in split for row in batch) == sorted(whole[0])
    # Two processes have the minibatch of one.
    ranks = [plan(rank=rank, world=2).response_batches(Cursor(0, 0), lengths) for rank in (0, 1)]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == sorted(whole[0])
    # More minibatches than groups.
    small = replace(plan(), batch_size=3, minibatches=3)
    assert [len(small.response_batches(Cursor(0, step), [5] * 3)[0]) for step in range(3)] == [1, 1, 1]


def test_other_prompts_are_fresh_while_there_are_any() -> None:
    used = {0, 2, 3, 6}
    first = plan().other_prompts(4, 1, used, 5)
    assert sorted(first[:3]) == [1, 4, 5]
    assert set(first[3:]) < used
    assert plan().other_prompts(4, 1, used, 5) == first
    assert plan().other_prompts(4, 2, used, 5) != first
