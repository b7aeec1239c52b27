"""Metrics of sampled chains, by hand and against counting every draw."""

from __future__ import annotations

from itertools import combinations

import pytest

from loopos.data.step_format import NAMED_FORMATS
from loopos.evaluation.checkers import Sample, Verdict, answer_metrics, checker, judge, majority, pass_at_k

THINK = NAMED_FORMATS["think"]


def verdicts(*texts: str, expected: str) -> list[Verdict]:
    samples = [Sample(text, num_tokens=10 + index, ended=index != 1) for index, text in enumerate(texts)]
    return judge(samples, expected, {}, step_format=THINK, checker=checker("auto"))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 1, 7), (4, 3, 2)])
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_sample(n: int, c: int, k: int) -> None:
    draws = list(combinations([index < c for index in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-15)


def test_majorities() -> None:
    assert majority(["4", "5", "5.0"]) == (1, 2 / 3)
    assert majority(["4", "5"]) == (0, 0.5)
    assert majority(["", "", "yes"]) == (2, 1 / 3)
    assert majority(["", " "]) is None


def test_verdicts() -> None:
    right, cut, wrong = verdicts(
        "<think>\n2 + 2 = 4\n</think>\n4", "<think>\n2 + 2", "<think>\na\nb\n</think>\n5 apples", expected="4"
    )
    assert [verdict.is_right for verdict in (right, cut, wrong)] == [True, False, False]
    assert (cut.parsed.answer, cut.score) == ("", 0.0)


def test_metrics_by_hand() -> None:
    problems = [
        verdicts(
            "<think>\na\n</think>\n4", "5", "<think>\na\nb\n</think>\n5", "<think>\nc\n</think>\n4.0", expected="4"
        ),
        verdicts("1", "<think>\na\n</think>\nyes", "no", "Yes.", expected="yes"),
    ]
    metrics = answer_metrics(problems, ks=[1, 3])
    assert metrics == {
        "accuracy": 0.5,
        "pass@1": 0.5,
        "majority@1": 0.5,
        "pass@3": 1.0,
        "majority@3": 0.0,
        "format_rate": 0.5,
        "mean_steps": (1 + 0 + 2 + 1 + 0 + 1 + 0 + 0) / 8,
        "mean_tokens": 11.5,
        "end_rate": 0.75,
    }
    assert answer_metrics(problems, ks=[4])["majority@4"] == 1.0


def test_what_cannot_be_measured_is_refused() -> None:
    one = verdicts("4", expected="4")
    for problems, ks in (
        ([], []),
        ([[]], []),
        ([one], [2]),
        ([one], [0]),
        ([one, verdicts("4", "5", expected="4")], []),
    ):
        with pytest.raises(ValueError):
            answer_metrics(problems, ks=ks)
