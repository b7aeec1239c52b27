"""What a response is worth: functions by name, weights, a missing end, bounds; best-of-n by hand."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from loopos.config.diagnostics import UserError
from loopos.config.rewards import PpoRewardSection
from loopos.config.rl import RolloutSection
from loopos.rl.policy_check import best_of_n
from loopos.rl.rewards import Response, Rewards, reward_function


def words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def same_as_asked(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    return [prompt == response for prompt, response in zip(prompts, responses, strict=True)]


def response(text: str, *, ended: bool = True, place: str = "") -> Response:
    return Response("a b", [1], text, [2], ended, place)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A reward function of the name own_rewards:score."""

    def build(function: Callable[..., object]) -> Any:
        module = ModuleType("own_rewards")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "own_rewards", module)
        return reward_function("own_rewards:score")

    return build


def section(**settings: object) -> PpoRewardSection:
    names = [{"name": f"{__name__}:words", "weight": 0.5}, {"name": f"{__name__}:same_as_asked", "weight": -2.0}]
    return PpoRewardSection.model_validate({"functions": names, **settings})


def with_row(text: str, **row: object) -> Response:
    return Response("a b", [1], text, [2], True, "", row)


def test_a_third_parameter_gets_the_rows(own: Callable[..., Any]) -> None:
    responses = [with_row("x", answer="x", tests=[1]), with_row("y", answer="z", tests=[2, 3])]
    number_of_tests = own(lambda prompts, responses, rows: [len(row["tests"]) for row in rows])
    assert number_of_tests(responses) == [1.0, 2.0]
    by_name = own(
        lambda prompts, responses, rows=(): [row["answer"] == text for row, text in zip(rows, responses, strict=True)]
    )
    assert by_name(responses) == [1.0, 0.0]
    # A third parameter with a default and another name is a setting of the user's.
    scaled = own(lambda prompts, responses, scale=2.0: [scale * len(text) for text in responses])
    assert scaled(responses) == [2.0, 2.0]
    many = own(lambda *parts: [len(parts) for _ in parts[1]])
    assert many(responses) == [2.0, 2.0]

    def changes(prompts: Sequence[str], responses: Sequence[str], rows: list[dict[str, object]]) -> list[int]:
        for row in rows:
            row.clear()
        return [0 for _ in responses]

    own(changes)(responses)
    assert responses[0].row == {"answer": "x", "tests": [1]}


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("auto", ["it is 4", "5"], [1.0, 0.0]),
        ("exact", ["4", "it is 4"], [1.0, 0.0]),
        ("numeric", ["4.0", "four and five"], [1.0, 0.0]),
    ],
)
def test_named_rewards_compare_with_the_answer_of_the_row(name: str, texts: list[str], expected: list[float]) -> None:
    assert reward_function(name)([with_row(text, Answer=4) for text in texts]) == expected
    assert reward_function("choice")([with_row("(b)", answer="B"), with_row("a", answer="B")]) == [1.0, 0.0]
    with pytest.raises(
        UserError, match=f'reward function {name}: got a row without a column "answer" .columns: result'
    ):
        reward_function(name)([with_row("4", result="4")])


def test_an_unknown_reward_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r'"exat"; expected "auto", "exact", .* or "module:name" of your own; did you mean'
    ):
        reward_function("exat")


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
    ("name", "summary"),
    [
        (f"{__name__}:absent", "has no function absent"),
        ("no_such_module:f", "cannot import no_such_module"),
    ],
)
def test_a_function_that_is_not_there(name: str, summary: str) -> None:
    with pytest.raises(UserError, match=summary):
        reward_function(name)


RETURNS: dict[str, Callable[[], object]] = {
    "a list": lambda: [1.0, 0.5],
    "whole numbers": lambda: [1, 0],
    "a tuple": lambda: (1.0, 0.5),
    "a generator": lambda: (value for value in (1.0, 0.5)),
    "a map": lambda: map(float, ("1", "0.5")),
    "truth values": lambda: [True, False],
    "fractions": lambda: [Fraction(1), Fraction(1, 2)],
    "decimals": lambda: [Decimal(1), Decimal("0.5")],
    "numpy fp32": lambda: [np.float32(1), np.float32(0.5)],
    "numpy fp16": lambda: [np.float16(1), np.float16(0.5)],
    "numpy int64": lambda: [np.int64(1), np.int64(0)],
    "numpy bool": lambda: [np.bool_(True), np.bool_(False)],
    "an array": lambda: np.array([1.0, 0.5]),
    "an array of truth values": lambda: np.array([True, False]),
    "an array [n, 1]": lambda: np.array([[1.0], [0.5]]),
    "a tensor": lambda: torch.tensor([1.0, 0.5]),
    "a tensor of integers": lambda: torch.tensor([1, 0]),
    "a tensor of bf16": lambda: torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
    "a tensor with a gradient": lambda: torch.tensor([1.0, 0.5], requires_grad=True),
    "a tensor [n, 1]": lambda: torch.tensor([[1.0], [0.5]]),
    "tensors": lambda: [torch.tensor(1.0), torch.tensor([0.5])],
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_people_return_is_taken(kind: str, own: Callable[..., Any]) -> None:
    whole = any(word in kind for word in ("whole", "truth", "int64", "bool", "integers"))
    found = own(lambda prompts, responses: RETURNS[kind]())([response("a"), response("b")])
    assert found == [1.0, 0.0 if whole else 0.5]
    assert all(type(score) is float for score in found)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a number": (lambda: 1.0, "returned a single number, 1.0; expected one number per response, here a list of 2"),
    "a numpy number": (lambda: np.float32(1), "returned a single number, 1.0; expected one number per response"),
    "a tensor []": (lambda: torch.tensor(1.0), "returned a single number, .*; expected one number per response"),
    "nothing": (lambda: None, r"returned None; expected one number per response, .* \(is a return missing\?\)"),
    "too few": (lambda: [1.0], "returned 1 numbers for 2 responses"),
    "too many": (lambda: np.ones(3), "returned 3 numbers for 2 responses"),
    "a text": (lambda: "ab", r"returned 'ab' \(str\); expected one number per response"),
    "a dictionary": (lambda: {"a": 1.0, "b": 2.0}, r"\(dict\); expected one number per response"),
    "a set": (lambda: {1.0, 2.0}, r"\(set\); expected one number per response"),
    "nan": (lambda: [1.0, math.nan], "returned nan; expected a finite number"),
    "numpy's nan": (lambda: np.array([1.0, np.nan]), "returned nan; expected a finite number"),
    "infinity": (lambda: [1.0, math.inf], "returned inf; expected a finite number"),
    "torch's infinity": (lambda: torch.tensor([1.0, -math.inf]), "returned -inf; expected a finite number"),
    "1e308": (lambda: [1.0, 1e308], r"returned 1e\+308; expected a finite number of at most 1e\+18 in size"),
    "a large whole number": (lambda: [1.0, 10**400], "expected a finite number of at most"),
    "a text in a list": (lambda: [1.0, "yes"], "returned 'yes'; expected a finite number"),
    "complex": (lambda: [1.0, 1j], "returned 1j; expected a finite number"),
    "[2, 2]": (lambda: torch.ones(2, 2), "expected a finite number"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_list_of_numbers_is_refused_by_one_sentence(kind: str, own: Callable[..., Any]) -> None:
    returns, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=f"^reward function own_rewards:score: .*{sentence}") as told:
        own(lambda prompts, responses: returns())([response("a"), response("b", place="train.jsonl:7")])
    if "finite number" in sentence and kind != "[2, 2]":
        assert "for train.jsonl:7, the prompt 'a b'" in str(told.value)


def test_an_exception_is_reported_with_function_row_and_prompt(own: Callable[..., Any]) -> None:
    def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [1.0 / len(each) for each in responses]

    function = own(raises)
    rows = [response("a", place="train.jsonl:3"), response("", place="train.jsonl:7"), response("c")]
    with pytest.raises(UserError) as told:
        function(rows)
    first, second = str(told.value).splitlines()
    line = inspect.getsourcelines(raises)[1] + 1
    assert first == (
        f"reward function own_rewards:score: raised ZeroDivisionError at {__file__}:{line}: float division by zero"
    )
    assert second == "    for train.jsonl:7, the prompt 'a b'"


def test_an_exception_of_all_rows_together_names_the_first(own: Callable[..., Any]) -> None:
    def raises(prompts: Sequence[str], responses: Sequence[str]) -> Iterator[float]:
        if len(responses) > 1:
            raise RuntimeError("too many\nat once")
        yield 1.0

    with pytest.raises(
        UserError, match=r"raised RuntimeError at .*: too many at once\n    for 2 responses, the first to"
    ):
        own(raises)([response("a"), response("b")])


def test_a_module_that_cannot_be_imported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("value = 1\nraise OSError('no such service')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"importing broken_rewards raised OSError at .*broken_rewards.py:2: no such"):
        reward_function("broken_rewards:score")


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
