"""What a response is worth: functions by name, weights, a missing end, bounds; best-of-n by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from loopos.config.faults import UserError
from loopos.config.ppo_sections import PpoRewardSection, RolloutSection
from loopos.evaluation.best_of_n import best_of_n
from loopos.evaluation.rewards import Response, Rewards, reward_function


def words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def same_as_asked(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    return [prompt == response for prompt, response in zip(prompts, responses, strict=True)]


def too_few(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0]


def not_numbers(prompts: Sequence[str], responses: Sequence[str]) -> list[object]:
    return [math.nan for _ in responses]


def response(text: str, *, ended: bool = True) -> Response:
    return Response("a b", [1], text, [2], ended)


def section(**settings: object) -> PpoRewardSection:
    names = [{"name": f"{__name__}:words", "weight": 0.5}, {"name": f"{__name__}:same_as_asked", "weight": -2.0}]
    return PpoRewardSection.model_validate({"functions": names, **settings})


def test_the_sum_is_weighted_and_a_missing_end_costs() -> None:
    rewards = Rewards(None, section(), RolloutSection(missing_end_penalty=1.5))
    found = rewards([response("a b c"), response("a b"), response("a b c d", ended=False)])
    assert found["total"] == [1.5, 1.0 - 2.0, 2.0 - 1.5]
    assert found[f"{__name__}:words"] == [3.0, 2.0, 4.0]
    assert found[f"{__name__}:same_as_asked"] == [0.0, 1.0, 0.0]


def test_the_bound_is_on_the_sum() -> None:
    found = Rewards(None, section(score_clip=1.0), RolloutSection())([response("a b c"), response("a b")])
    assert found["total"] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{__name__}:absent", "has no function absent"),
        ("no_such_module:f", "cannot import no_such_module"),
    ],
)
def test_a_function_that_is_not_there(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reward_function(name)


@pytest.mark.parametrize(("name", "said"), [("too_few", "1 scores for 2 responses"), ("not_numbers", "finite number")])
def test_a_function_that_returns_something_else(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reward_function(f"{__name__}:{name}")(["a", "b"], ["c", "d"])


def test_best_of_n_by_hand() -> None:
    answers = [[response("a"), response("a b c")], [response("a b"), response("a")]]

    def score(responses: Sequence[Response]) -> list[float]:
        return words([], [each.text for each in responses])

    def judge(responses: Sequence[Response]) -> list[float]:
        return [10.0 * len(each.text.split()) for each in responses]

    found = best_of_n(answers, score, [1, 2], judge)
    # Expected best of one: the mean, (1 + 3 + 2 + 1)/4; of two: (3 + 2)/2. The judge reads the first, and the best, of each.
    assert [told["reward"] for told in found] == [1.75, 2.5]
    assert [told["judge"] for told in found] == [15.0, 25.0]
    assert [told["kl"] for told in found] == [0.0, pytest.approx(math.log(2) - 0.5)]
