"""Which scored responses become rows: best, pairs, groups and all, on prompts made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loopos.data.conversations import Message
from loopos.evaluation.checkers import Sample
from loopos.rl.selection import SELECTIONS, JudgedPrompt, SelectionRule, length_metrics

ASKED = (Message("user", "where is it"),)


def judged(*responses: tuple[str, float | None], number: int = 0, **facts: Any) -> JudgedPrompt:
    """A prompt with these texts and scores; a text that ends in … was cut."""
    samples = tuple(Sample(text, len(text), not text.endswith("…")) for text, _ in responses)
    return JudgedPrompt(number, facts.pop("prompt", ASKED), samples, tuple(score for _, score in responses), **facts)


def texts(rows: list[dict[str, Any]], column: str) -> list[str]:
    return [row[column][-1]["content"] for row in rows]


def test_best_takes_the_first_of_the_highest_that_ended() -> None:
    prompt = judged(("cut…", 9.0), ("low", 1.0), ("high", 3.0), ("too", 3.0), (" ", 8.0), ("?", None))
    assert texts(SELECTIONS["best"](prompt, SelectionRule()).rows, "messages") == ["high"]
    assert texts(SELECTIONS["best"](prompt, SelectionRule(allow_cut=True)).rows, "messages") == ["cut…"]
    assert texts(SELECTIONS["best"](prompt, SelectionRule(top=3)).rows, "messages") == ["high", "too", "low"]
    assert texts(SELECTIONS["best"](prompt, SelectionRule(top=3, threshold=3.0)).rows, "messages") == ["high", "too"]
    none = SELECTIONS["best"](prompt, SelectionRule(threshold=4.0))
    assert (none.rows, none.chosen, none.rejected) == ([], (), ())


def test_top_takes_distinct_texts() -> None:
    prompt = judged(("a b", 2.0), ("a  b", 2.0), ("c", 1.0))
    found = SELECTIONS["best"](prompt, SelectionRule(top=2))
    assert texts(found.rows, "messages") == ["a b", "c"]
    assert (found.chosen, found.rejected) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SelectionRule(), [("b", "d")]),
        (SelectionRule(pairs="all"), [("a", "c"), ("a", "d"), ("b", "a"), ("b", "c"), ("b", "d"), ("c", "d")]),
        (SelectionRule(pairs="all", min_margin=2.0), [("b", "c"), ("b", "d")]),
        (SelectionRule(pairs="all", threshold=3.0), [("b", "a"), ("b", "c"), ("b", "d")]),
        (SelectionRule(min_margin=3.0), []),
        (SelectionRule(threshold=4.0), []),
    ],
)
def test_pairs(rule: SelectionRule, expected: list[tuple[str, str]]) -> None:
    # Two responses have the text c: a pair of texts comes once.
    prompt = judged(("a", 2.0), ("b", 3.0), ("c", 1.0), ("c", 1.0), ("d", 0.5))
    found = SELECTIONS["pairs"](prompt, rule)
    pairs = list(zip(texts(found.rows, "chosen"), texts(found.rows, "rejected"), strict=True))
    assert pairs == expected


def test_a_pair_has_its_margin_and_random_pairs_are_fixed_by_the_seed() -> None:
    (row,) = SELECTIONS["pairs"](judged(("a", 2.0), ("b", 0.5)), SelectionRule()).rows
    assert (row["margin"], row["score_chosen"], row["score_rejected"]) == (1.5, 2.0, 0.5)
    assert row["prompt"] == [{"role": "user", "content": "where is it"}]
    scores = (("a", 9.0), *((letter, float(index)) for index, letter in enumerate("bcdefgh")))
    rule = SelectionRule(pairs="random", seed=1)
    drawn = [texts(SELECTIONS["pairs"](judged(*scores, number=n), rule).rows, "rejected")[0] for n in range(40)]
    assert drawn == [texts(SELECTIONS["pairs"](judged(*scores, number=n), rule).rows, "rejected")[0] for n in range(40)]
    assert len(set(drawn)) > 4


def test_ties_and_equal_texts_are_no_pairs() -> None:
    assert SELECTIONS["pairs"](judged(("a", 1.0), ("b", 1.0)), SelectionRule(pairs="all")).rows == []
    # A function may score one text twice in two ways.
    assert SELECTIONS["pairs"](judged(("a", 1.0), ("a ", 0.0)), SelectionRule(pairs="all")).rows == []
    # The best was cut: the next one that ended is chosen.
    (row,) = SELECTIONS["pairs"](judged(("a…", 3.0), ("b", 2.0), ("c…", 0.0)), SelectionRule()).rows
    assert texts([row], "chosen") + texts([row], "rejected") == ["b", "c…"]


def test_groups_have_distinct_responses_and_a_signal() -> None:
    (row,) = SELECTIONS["groups"](judged(("a", 1.0), ("a ", 1.0), ("b", 0.0), ("c", None)), SelectionRule()).rows
    assert [response[0]["content"] for response in row["responses"]] == ["a", "b"]
    assert row["scores"] == [1.0, 0.0]
    assert SELECTIONS["groups"](judged(("a", 1.0), ("b", 1.0)), SelectionRule()).rows == []


def test_all_labels_what_passes_and_ended() -> None:
    prompt = judged(("a", 1.0), ("b…", 1.0), ("c", 0.0), ("d", None), ("", 1.0))
    found = SELECTIONS["all"](prompt, SelectionRule(threshold=1.0))
    assert [row["label"] for row in found.rows] == [True, False, False]
    assert [row["sample"] for row in found.rows] == [0, 1, 2]
    assert (found.chosen, found.rejected) == ((0,), (1, 2))
    without = SELECTIONS["all"](prompt, SelectionRule())
    assert ["label" in row for row in without.rows] == [False] * 4
    assert ["score" in row for row in without.rows] == [True, True, True, False]


def test_tools_system_messages_and_columns_stay() -> None:
    tool = {"type": "function", "function": {"name": "find", "description": "", "parameters": {}}}
    before = (Message("system", "be kind"), *ASKED, Message("assistant", "here"), Message("user", "thank you"))
    prompt = judged(("a", 1.0), ("b", 0.0), prompt=before, tools=(tool,), columns={"answer": "x"})
    for keep in SELECTIONS:
        (row, *_) = SELECTIONS[keep](prompt, SelectionRule(threshold=1.0)).rows
        assert row["tools"] == [tool]
        assert row["row"] == {"answer": "x"}
        messages = row["messages"][:-1] if keep == "best" else row["prompt"]
        weights = [{"weight": 0} if keep == "best" and each.role == "assistant" else {} for each in before]
        assert messages == [each.as_template() | weight for each, weight in zip(before, weights, strict=True)]


def test_lengths() -> None:
    assert length_metrics([4, 2], [1, 2], in_pairs=True) == {
        "chosen_tokens": 3.0,
        "rejected_tokens": 1.5,
        "longer_chosen": 0.75,
    }
    assert length_metrics([4], [], in_pairs=False) == {"chosen_tokens": 4.0}
