"""Figures of several scored responses to a prompt, worked by hand."""

from __future__ import annotations

import pytest

from loopos.evaluation.checkers import Sample
from loopos.evaluation.policy_metrics import wilson_interval
from loopos.evaluation.sample_metrics import PromptFigures, length_correlation, powers_to, sample_metrics


def figures(*responses: tuple[str, int, float | None]) -> PromptFigures:
    """Of (text, tokens, score); an even number of tokens ended by itself."""
    samples = [Sample(text, tokens, tokens % 2 == 0) for text, tokens, _ in responses]
    return PromptFigures.of(samples, [score for *_, score in responses])


# 2 of 4 pass; the second prompt has no signal; the third one response without a score.
FIRST = figures(("a b", 2, 1.0), ("a  b ", 3, 1.0), ("a b", 4, 0.0), (" ", 5, 0.0))
SECOND = figures(("c", 2, 0.0), ("d", 2, 0.0), ("e", 2, 0.0), ("f", 2, 0.0))
THIRD = figures(("g", 6, 1.0), ("h", 2, 0.0), ("i", 9, None), ("j", 1, 0.0))


def test_by_hand() -> None:
    found = sample_metrics([FIRST, SECOND, THIRD], threshold=1.0)
    assert (found["prompts"], found["responses"], found["unjudged"]) == (3, 12, 1)
    assert found["mean_tokens"] == (14 + 8 + 18) / 12
    assert found["end_rate"] == (2 + 4 + 2) / 12
    assert (found["duplicates_exact"], found["duplicates"], found["blank"]) == (1 / 12, 2 / 12, 1 / 12)
    assert found["mean_score"] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)
    assert found["no_signal"] == 1 / 3
    # Of the prompts with all scores: 1 − C(2, k) / C(4, k) of the first, 0 of the second.
    assert [found[f"pass@{k}"]["rate"] for k in (1, 2, 4)] == pytest.approx([1 / 4, 5 / 12, 1 / 2])
    assert (found["pass@4"]["low"], found["pass@4"]["high"]) == wilson_interval(1.0, 2)
    # With scores of 0 and 1 the best of k is pass@k.
    assert [found[f"best_of@{k}"] for k in (1, 2, 4)] == pytest.approx([1 / 4, 5 / 12, 1 / 2])


def test_what_is_not_defined_is_left_out() -> None:
    unjudged = sample_metrics([figures(("a", 2, None), ("b", 3, None))], threshold=1.0)
    assert not {"mean_score", "no_signal", "unjudged"} & set(unjudged)
    no_threshold = sample_metrics([FIRST], threshold=None)
    assert "best_of@4" in no_threshold
    assert not any(name.startswith("pass@") for name in no_threshold)
    # A single length has no correlation.
    assert "score_length_correlation" not in sample_metrics([SECOND], threshold=None)
    with pytest.raises(ValueError, match="no prompts"):
        sample_metrics([], threshold=None)


def test_the_correlation_is_within_prompts() -> None:
    # Within each prompt the score grows with length; over all responses the short prompt has the high scores.
    easy, hard = [(10.0, 1), (11.0, 2)], [(0.0, 101), (1.0, 102)]
    assert length_correlation([easy, hard]) == pytest.approx(1.0)
    # Deviations (−1, 0, 1) and (1, −1, 0): −1 / √(2 · 2).
    assert length_correlation([[(0.0, 8), (1.0, 6), (2.0, 7)]]) == pytest.approx(-0.5)
    assert length_correlation([[(1.0, 8), (1.0, 6)]]) is None


def test_powers() -> None:
    assert [powers_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
