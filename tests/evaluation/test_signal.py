"""The signal of sampled groups: figures by hand, and which sentence each problem of a reward brings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from loopos.evaluation.checkers import Sample
from loopos.evaluation.signal import SampledGroup, advice, signal_metrics, signal_of


def group(scores: Sequence[float], *, tokens: Sequence[int] | None = None, ended: bool = True) -> SampledGroup:
    lengths = tokens or [3 + (index % 4 in (1, 2)) for index in range(len(scores))]
    answers = tuple(Sample(f"answer {index}", length, ended) for index, length in enumerate(lengths))
    return SampledGroup(answers, tuple(scores), {"exact": tuple(scores)})


def measured(groups: Sequence[SampledGroup], **options: Any) -> dict[str, Any]:
    return signal_metrics(groups, **{"weights": {"exact": 1.0}, "threshold": 1.0, "group_size": 2, **options})


def sentences(metrics: dict[str, Any], *, compares_groups: bool = True, temperature: float = 1.0) -> list[str]:
    return [*advice(metrics, compares_groups=compares_groups, temperature=temperature)]


@pytest.mark.parametrize("scores", [[0.0, 0, 1, 1], [0.0, 0, 0, 1], [2.0, 2, 2, 2], [0.0, 1, 2, 2]])
def test_the_signal_of_smaller_groups_is_that_of_all_draws(scores: list[float]) -> None:
    draws = [*itertools.combinations(scores, 2)]
    assert signal_of(scores, 2) == pytest.approx(sum(a != b for a, b in draws) / len(draws))


def test_figures_by_hand() -> None:
    metrics = measured([group([1.0, 0, 0, 0]), group([0.0] * 4), group([1.0] * 4)])
    assert metrics["pass@1"]["rate"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert metrics["pass@4"]["rate"] == pytest.approx(2 / 3)
    assert (metrics["signal"], metrics["all_pass"], metrics["none_pass"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # Three of the six pairs of (1, 0, 0, 0) differ.
    assert metrics["signal@2"] == pytest.approx(0.5 / 3)
    part = metrics["parts"]["exact"]
    assert part["mean"] == pytest.approx(5 / 12)
    assert part["std"] == pytest.approx((5 / 12 * 7 / 12) ** 0.5)
    assert part["no_signal"] == pytest.approx(2 / 3)
    assert part["weighted_std_in_group"] == pytest.approx((0.25 * 0.75) ** 0.5 / 3)


def test_a_task_without_success() -> None:
    (first, second) = sentences(measured([group([0.0] * 4)] * 3))
    assert first.startswith("no answer passes")
    assert second.startswith("the reward exact is 0 for every answer")


def test_a_solved_task() -> None:
    assert "little to learn" in sentences(measured([group([1.0] * 4)] * 3))[0]


def test_few_groups_with_signal() -> None:
    mixed, failed = group([1.0, 0, 1, 0]), group([0.0] * 4)
    assert sentences(measured([mixed] * 6 + [failed] * 4)) == []
    (some,) = sentences(measured([mixed] * 3 + [failed] * 7))
    assert some.startswith("70% of the groups have no signal")
    assert sentences(measured([mixed] * 3 + [failed] * 7), compares_groups=False) == []
    (few,) = sentences(measured([mixed] + [failed] * 11))
    assert few.startswith("only 8% of the prompts")


def test_a_reward_that_likes_length() -> None:
    groups = [group([2.0, 4, 6, 8], tokens=[2, 4, 6, 8])] * 3
    (about_length,) = sentences(measured(groups, threshold=None))
    assert about_length.startswith("the reward prefers longer answers to the same prompt (correlation 1.00)")


def test_answers_without_end_and_repeated_answers() -> None:
    cut = group([1.0, 0, 1, 0], ended=False)
    assert sentences(measured([cut] * 3))[0].startswith("100% of the answers end at the token limit")
    same = SampledGroup((Sample("yes", 3, True),) * 4, (1.0, 0.0, 1.0, 0.0), {"exact": (1.0, 0.0, 1.0, 0.0)})
    (repeated,) = sentences(measured([same] * 3), temperature=0.7)
    assert repeated == "75% of the answers repeat another answer to their prompt: raise generation.temperature"


def test_one_reward_that_outweighs_the_others() -> None:
    parts = {"exact": (1.0, 0.0, 0.0, 1.0), "length": (0.0, 0.1, 0.0, 0.1)}
    scores = tuple(a + b for a, b in zip(*parts.values(), strict=True))
    groups = [SampledGroup(group(scores).answers, scores, parts)] * 3
    *_, outweighed = sentences(measured(groups, weights={"exact": 1.0, "length": 1.0}, threshold=None))
    assert outweighed.startswith("the reward exact makes 91% of the differences within groups")
    balanced = sentences(measured(groups, weights={"exact": 0.2, "length": 1.0}, threshold=None))
    assert not [each for each in balanced if "differences within groups" in each]
