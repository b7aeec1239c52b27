"""Experience with hand-computed numbers: the old policy of the ratio, and importance weights of an older policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from loopos.rl.algorithms import PPO, AdvantageInputs, Algorithm, PolicyInputs
from loopos.rl.experience import AdvantageSettings, Experience, experience_of


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    mask: list[bool] | None = None


@dataclass(frozen=True)
class Judged:
    response: Tokens
    score: float
    logprobs: Tensor
    engine_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    staleness: int


def judged(staleness: int) -> list[Judged]:
    """Two responses, of two tokens and of one; π/μ is 2, 4 and 0.5 for their tokens."""
    rows = [([7, 8], 1.0, [0.5, 0.8], [0.25, 0.2]), ([9], -1.0, [0.1], [0.2])]
    return [
        Judged(
            Tokens(ids),
            score,
            torch.tensor(new).log(),
            torch.tensor(old).log(),
            torch.full((len(ids),), 0.5).log(),
            torch.zeros(len(ids)),
            staleness,
        )
        for ids, score, new, old in rows
    ]


def experience(old: Literal["forward", "engine"], *, staleness: int = 1, cap: float | None = None) -> Experience:
    settings = AdvantageSettings(
        penalty=None, discount=1.0, gae_lambda=1.0, whiten_rewards=False, whiten_advantages=False, importance_cap=cap
    )
    return experience_of([[1], [2, 3]], judged(staleness), old_logprobs=old, kl_coefficient=0.1, settings=settings)


def test_the_ratio_uses_the_generating_policy_or_the_one_before_the_update() -> None:
    torch.testing.assert_close(experience("engine").old_logprobs.exp(), torch.tensor([0.25, 0.2, 0.2]))
    torch.testing.assert_close(experience("forward").old_logprobs.exp(), torch.tensor([0.5, 0.8, 0.1]))
    for each in (experience("engine"), experience("forward")):
        assert each.advantages.tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("old", "staleness", "own"), [("engine", 1, False), ("engine", 0, True), ("forward", 1, True), ("forward", 0, True)]
)
def test_the_first_ratio_is_1_where_the_policy_before_the_update_is_the_old_one(
    old: Literal["forward", "engine"], staleness: int, own: bool
) -> None:
    found = experience(old, staleness=staleness)
    assert found.is_own is own
    assert Experience.of_tensors(found.tensors(), found.kl_coefficient, is_own=found.is_own) is not found


def test_advantages_are_weighed_and_returns_are_not() -> None:
    found = experience("forward", cap=3.0)
    torch.testing.assert_close(found.advantages, torch.tensor([2.0, 3.0, -0.5]))
    assert found.returns.tolist() == [1.0, 1.0, -1.0]


def test_without_a_critic_there_are_advantages_only() -> None:
    """A baseline of the mean score of a group: 1 − 0 and −1 − 0; no values, returns or reference are kept."""
    seen: list[AdvantageInputs] = []

    def advantages(inputs: AdvantageInputs) -> Tensor:
        seen.append(inputs)
        return (inputs.scores - inputs.scores.mean())[:, None].expand_as(inputs.rewards)

    algorithm = Algorithm("own", advantages, lambda inputs: -inputs.advantages * inputs.logprobs, has_critic=False)
    settings = AdvantageSettings(
        penalty="k1",
        discount=1.0,
        gae_lambda=1.0,
        whiten_rewards=False,
        whiten_advantages=False,
        algorithm=algorithm,
        responses_per_prompt=2,
    )
    rows = [replace(each, values=None, reference_logprobs=None) for each in judged(0)]
    found = experience_of([[1], [1]], rows, old_logprobs="forward", kl_coefficient=0.0, settings=settings)
    assert found.advantages.tolist() == [1.0, 1.0, -1.0]
    assert (found.values, found.returns, found.reference_logprobs) == (None, None, None)
    (inputs,) = seen
    assert (inputs.groups.tolist(), inputs.values) == ([0, 0], None)
    assert inputs.rewards.tolist() == [[0.0, 1.0], [-1.0, 0.0]]
    # A column of padding is no advantage.
    assert inputs.mask.tolist() == [[True, True], [True, False]]
    again = Experience.of_tensors(found.tensors(), 0.0, is_own=True)
    assert "values" not in found.tensors()
    assert again.rows(torch.device("cpu"))([1, 0]).responses.tolist() == [0, 1, 1]
    assert set(again.rows(torch.device("cpu"))([0]).columns) == {"old_logprobs", "advantages"}


def test_ppo_keeps_its_returns_and_a_plain_loss_is_described() -> None:
    algorithm = Algorithm("own", lambda inputs: inputs.rewards, lambda inputs: -inputs.logprobs, has_critic=False)
    old, new = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log()
    inputs = PolicyInputs(
        logprobs=new, old_logprobs=old, advantages=torch.ones(2), responses=torch.tensor([0, 0]), clip_epsilon=0.2
    )
    terms = algorithm.policy_loss(inputs)
    torch.testing.assert_close(terms.ratio, torch.tensor([0.5, 1.0]))
    # k3 of KL(old ‖ new): ½ − 1 − ln ½ for the first token.
    torch.testing.assert_close(terms.approximate_kl, torch.tensor([math.log(2) - 0.5, 0.0]))
    assert terms.is_clipped.tolist() == [0.0, 0.0]
    assert PPO.policy_loss(inputs).loss.tolist() == pytest.approx([-0.5, -1.0])
