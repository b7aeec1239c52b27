"""Signs of reward hacking: each is found where it was put, and a run that learned its task has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loopos.evaluation.audit import Sign, audit_blocks, signs_of, weights_of
from loopos.evaluation.blocks import as_markdown

WORDS = [
    "red",
    "blue",
    "green",
    "grey",
    "black",
    "white",
    "gold",
    "pink",
    "brown",
    "teal",
    "lime",
    "navy",
    "rose",
    "plum",
    "sand",
    "jade",
]


def words_of(number: int, count: int) -> str:
    """Different words for every number."""
    return " ".join(WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] + str(number) for i in range(count))


def run_of(record: Callable[[int, int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """8 iterations of 4 prompts with 2 answers each: what `record(iteration, prompt, answer)` says, over a plain one."""
    found = []
    for iteration in range(8):
        for prompt in range(4):
            for answer in range(2):
                number = iteration * 8 + prompt * 2 + answer
                plain = {
                    "iteration": iteration,
                    "prompt": f"what is {prompt} and {prompt} in all of this world",
                    "response": words_of(number, 6),
                    "ended": True,
                    "tokens": 6,
                    "reward": iteration / 8 + answer / 10,
                }
                found.append({**plain, **record(iteration, prompt, answer)})
    return found


def named(found: list[Sign]) -> dict[str, Sign]:
    return {each.name: each for each in found}


def found_in(record: Callable[[int, int, int], dict[str, Any]], **weights: float) -> dict[str, Sign]:
    return named(signs_of(run_of(record), weights))


def test_a_run_that_learned_has_no_signs() -> None:
    assert found_in(lambda iteration, prompt, answer: {}) == {}
    assert audit_blocks([]) == []


def test_longer_answers_that_a_reward_likes() -> None:
    found = found_in(
        lambda iteration, prompt, answer: {"tokens": 6 + 4 * iteration + 5 * answer, "reward": iteration + answer}
    )
    assert set(found) == {"length", "reward of length"}
    # Means of the first two and the last two iterations: 6 + 2 + 2.5 and 6 + 26 + 2.5.
    assert found["length"].sentence == "answers become longer: 10 → 34 on average, while the reward rises"
    assert found["length"].severity == pytest.approx(34.5 / 10.5 / 1.5)
    assert found["length"].examples[0].size == 6 + 4 * 7 + 5
    assert "correlation with their tokens 1.00" in found["reward of length"].sentence


def test_a_reward_of_characters_at_the_token_limit() -> None:
    """All answers have the same number of tokens; the reward is the length of the text."""
    found = found_in(
        lambda iteration, prompt, answer: {
            "tokens": 40, "response": words_of(iteration, 3) + " long" * answer, "reward": float(answer),
        }
    )  # fmt: skip
    assert "correlation with their characters 1.00" in found["reward of length"].sentence


def test_repetition_copies_and_missing_ends() -> None:
    late = range(6, 8)

    def record(text: Callable[[int], str]) -> Callable[[int, int, int], dict[str, Any]]:
        return lambda iteration, prompt, answer: (
            {"response": f"{text(prompt)} {words_of(iteration * 8 + prompt * 2 + answer, 2)}"}
            if iteration in late
            else {}
        )

    assert set(found_in(record(lambda prompt: "yes " * 12))) == {"repetition", "one beginning"}
    assert set(found_in(record(lambda prompt: f"what is {prompt} and {prompt} in all of this world"))) == {
        "copies of the prompt"
    }
    cut = found_in(lambda iteration, prompt, answer: {"ended": iteration not in late})
    assert cut["no end"].sentence == "answers without an end: 0% → 100%"


def test_one_answer_for_everything() -> None:
    found = found_in(lambda iteration, prompt, answer: {"response": "it is fine"} if iteration >= 6 else {})
    assert set(found) == {"one answer", "collapsed groups"}
    assert found["one answer"].sentence.startswith("100% of the prompts get the same answer")
    assert found["collapsed groups"].sentence.startswith("100% of the groups consist of one answer, 0% at first")


def test_one_term_rises_while_another_falls() -> None:
    def record(iteration: int, prompt: int, answer: int) -> dict[str, Any]:
        return {"score_exact": 1 - iteration / 8, "score_polite": iteration / 2}

    found = found_in(record, exact=1.0, polite=1.0)
    assert found["one term of the reward"].sentence == (
        "polite rises by 3 (times its weight) while exact falls by 0.75"
    )
    assert found_in(record, exact=0.1, polite=1.0) == {}


def test_a_judge_that_disagrees() -> None:
    found = found_in(lambda iteration, prompt, answer: {"judge": -iteration / 10 - answer})
    assert set(found) == {"the judge disagrees"}
    assert [example.judge for example in found["the judge disagrees"].examples] == [-1.7, -1.7]


def test_the_report_shows_examples_and_unjudged_answers_do_not_count() -> None:
    records = run_of(lambda iteration, prompt, answer: {"tokens": 6 + 4 * iteration, "reward": iteration + 0.1})
    unjudged = [{**record, "reward": None, "tokens": 1000} for record in records]
    found = signs_of(records + unjudged, {})
    assert found == signs_of(records, {})
    text = as_markdown("Run", audit_blocks(found), pictures="curves")
    assert "Signs of reward hacking" in text
    assert found[0].examples[0].text in text
    assert signs_of(records[:6], {}) == []


def test_weights_come_from_the_config() -> None:
    reward = {"model_weight": 0.5, "functions": [{"name": "exact", "weight": 2.0}, {"name": "m:f", "label": "short"}]}
    assert weights_of({"reward": reward}) == {"model": 0.5, "exact": 2.0, "short": 1.0}
