"""Experience with hand-computed numbers: the old policy of the ratio, and importance weights of an older policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from loopos.rl.experience import AdvantageSettings, Experience, experience_of


@dataclass(frozen=True)
class Tokens:
    ids: list[int]


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
