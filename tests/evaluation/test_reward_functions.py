"""The built-in rewards, by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.variants import REWARDS
from loopos.rl.rewards import Response, reward_function


def scores(name: str, *texts: str, row: dict[str, object] | None = None, **options: Any) -> list[float | None]:
    responses = [Response("q", [1], text, list(range(len(text))), True, "", row or {}) for text in texts]
    return reward_function(name, options=options)(responses)


def test_every_reward_has_a_line_of_what_it_is() -> None:
    assert len(list(REWARDS)) >= 15
    for name in REWARDS:
        assert len(REWARDS[name].summary) > 30, name


def test_answers() -> None:
    assert scores("multiple_choice", "(b)", "a", row={"answer": "B"}) == [1.0, 0.0]
    assert scores("numeric", "4.05", "5", row={"answer": 4}, tolerance=0.1) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["exact", "numeric", "auto"])
def test_the_answer_of_steps_is_read_in_every_named_format(name: str) -> None:
    chains = (
        "<think>\n9 + 3 = 12, carry 1: 2\n</think>\n12",
        "9 + 3 = 12\nso\n</think>\n\n12",
        "9 + 3 = 12\n#### 12",
        "First 9.\nThen 3.\n12",
        "12",
    )
    assert scores(name, *chains, row={"answer": "12"}) == [1.0] * 5
    assert scores(name, *chains, row={"answer": "13"}) == [0.0] * 5
    wrong = ("<think>\n9 + 3\n12", "<think>\n12\n</think>\n", "<think>\n12\n</think>\n11", "9 + 3 = 12\n#### 11", "")
    assert scores(name, *wrong, row={"answer": "12"}) == [0.0] * 5
    assert scores(name, "#### Step 1\nNine and three.\n12", "<think>a</think>\nb\n#### 12", row={"answer": 12}) == [
        1,
        1,
    ]


def test_the_answer_in_a_chosen_step_format() -> None:
    chain = "a #### 7\nA: 12"
    assert scores("exact", chain, row={"answer": "12"}, step_format="hashes") == [0.0]
    own = {"opening": "", "closing": "", "delimiter": "\n", "answer_marker": "A: "}
    assert scores("exact", chain, row={"answer": "12"}, step_format=own) == [1.0]


def test_regular_expressions() -> None:
    assert scores("regex", "a1", "A", "b", pattern="(?i)a") == [1.0, 1.0, 0.0]
    assert scores("regex", "a1", "a", pattern="a", whole=True) == [0.0, 1.0]
    assert scores("regex", "xyz", row={"pattern": "y.$"}) == [1.0]
    with pytest.raises(UserError, match=r"regex: the pattern '\(': .*unterminated"):
        scores("regex", "a", pattern="(")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_json_by_its_schema() -> None:
    texts = ('{"n": 1}', '{"n": "1"}', "{", 'Sure:\n```json\n{"n": 2}\n```\nDone.', "[" * 100_000)
    assert scores("json_schema", *texts, schema=SCHEMA) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert scores("json_schema", '{"n": "1"}', row={"Schema": str(SCHEMA).replace("'", '"')}, parsed=0.25) == [0.25]
    with pytest.raises(UserError, match=r"json_schema: the schema .* is none: 'objekt' is not valid"):
        scores("json_schema", "{}", schema={"type": "objekt"})
    with pytest.raises(UserError, match="no such reference"):
        scores("json_schema", "{}", schema={"$ref": "http://localhost:9/schema.json"})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingRequirement, match=r"the package jsonschema is not installed[\s\S]*pip install"):
        scores("json_schema", "{}", schema={"type": "null"})


def test_steps_and_an_answer() -> None:
    chain = "<think>\nfour and four\nis eight\n</think>\n8"
    assert scores("steps_format", chain, "8", "<think>\na\n</think>\n") == [1.0, 0.0, 0.0]
    assert scores("steps_format", chain, max_steps=1) == [0.0]
    assert scores("steps_format", "one\n#### 8", step_format="hashes") == [1.0]
    marks = {"opening": "", "closing": "", "delimiter": "\n", "answer_marker": "A: "}
    assert scores("steps_format", "one\nA: 8", step_format=marks) == [1.0]


def test_a_window_of_lengths() -> None:
    # Lengths 2, 4, 6 and 9 in tokens; one token is one character here.
    assert scores("length_window", "ab", "abcd", "abcdef", "abcdefghi", minimum=3, maximum=5, soft=2) == [
        -0.5, 0.0, -0.5, -1.0,
    ]  # fmt: skip
    assert scores("length_window", "a b c", "a", minimum=2, unit="words") == [0.0, -1.0]


def test_soft_overlong_punishment_is_that_of_dapo() -> None:
    longest, cache = 20, 5

    def dapo(length: int) -> float:
        if length <= longest - cache:
            return 0.0
        return (longest - cache - length) / cache if length <= longest else -1.0

    lengths = range(1, 30)
    found = scores("length_window", *("x" * length for length in lengths), maximum=longest - cache, soft=cache)
    assert found == [pytest.approx(dapo(length)) for length in lengths]


def test_repeated_words() -> None:
    assert scores("repetition", "a b a b a", "a b c", "a", n=2) == [-0.5, 0.0, 0.0]
    assert scores("repetition", "aaaa", n=1, unit="characters") == [-0.75]


def test_letters_of_a_script() -> None:
    assert scores("language", "ab вг 1", "123", "日本 a", scripts=["latin"]) == [0.5, None, pytest.approx(1 / 3)]
    assert scores("language", "日本の", scripts=["cjk", "hiragana"]) == [1.0]
