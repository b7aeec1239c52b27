"""Win rates worked by hand, and judges that contradict themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from loopos.config.diagnostics import UserError
from loopos.data.conversations import Message
from loopos.data.prompts import prompt_text
from loopos.evaluation.policy_metrics import win_rate
from loopos.evaluation.winrate import (
    Contest,
    Pair,
    Reply,
    Ruling,
    Winner,
    by_function,
    rate_of,
    record,
    standard_error,
    summary,
)


def pair(index: int, winner: Winner, *, a: str = "yes", b: str = "no!", orders: Any = None) -> Pair:
    contest = Contest((Message("user", f"asked {index}"),), a, b)
    return Pair(index, 0, contest, Reply(a, 4, True), Reply(b, 6, False), Ruling(winner, orders))


def test_one_pair_a_prompt_is_the_win_rate_of_scores() -> None:
    pairs = [pair(0, "a"), pair(1, "a"), pair(2, "b"), pair(3, "tie")]
    assert rate_of(pairs) == win_rate([2, 2, 0, 1], [1, 1, 1, 1])
    assert rate_of(pairs).rate == 0.625


def test_pairs_of_one_prompt_are_one_trial() -> None:
    # Prompt 0: 1, 1, 0, so 2/3; prompt 1: 0. Their mean is 1/3, while the mean over pairs would be 1/2.
    pairs = [pair(0, "a"), pair(0, "a"), pair(0, "b"), pair(1, "b")]
    found = rate_of(pairs)
    assert found.rate == pytest.approx(1 / 3)
    assert (found.wins, found.losses, found.ties) == (2, 2, 0)
    # Repeating every pair tells nothing new.
    again = rate_of(pairs * 5)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    # s = √(2 · (1/3)²) = √2/3 over √2.
    assert standard_error(pairs) == pytest.approx(1 / 3)
    assert standard_error(pairs[:1]) is None


def test_where_one_side_wins_all_the_interval_has_a_width() -> None:
    # Wilson with s = t = 10: from 1 / (1 + z²/10) to 1.
    found = rate_of([pair(index, "a") for index in range(10)])
    assert (found.low, found.high) == pytest.approx((1 / (1 + 1.959963984540054**2 / 10), 1.0))


def test_length_and_orders_are_reported() -> None:
    long = "n" * 10
    pairs = [
        pair(0, "a", a="y" * 8, b=long, orders=("a", "a")),
        pair(1, "b", a="y" * 7, b=long, orders=("b", "b")),
        pair(2, "tie", a=long, b=long, orders=("a", "b")),
        pair(3, "tie", a="", b="", orders=("b", "a")),
        pair(4, "tie", a="", b="y", orders=("tie", "a")),
    ]
    found = summary(pairs)
    assert found["like_length"]["prompts"] == 3
    assert found["like_length"]["rate"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found["both_orders"] == {"asked": 5, "contradictions": 3, "first_favoured": 1, "second_favoured": 1}
    assert found["identical"] == 2
    assert found["length"]["a"] == {"characters": 5.0, "tokens": 4.0, "end_rate": 1.0}
    assert record(pairs[2], "asked 2")["orders"] == ["a", "b"]


def test_scores_of_single_answers_have_no_order() -> None:
    found = summary([pair(0, "a")])
    assert "both_orders" not in found
    assert math.isclose(found["win_rate"]["rate"], 1.0)


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_judges.py").write_text(
        "import numpy as np\nimport torch\n"
        "def first(prompt, first, second):\n    return 'first'\n"
        "def longer(prompt, first, second):\n    return len(first), len(second)\n"
        "def leaning(prompt, first, second):\n    return len(first) + 1.5, len(second)\n"
        "def right(prompt, first, second):\n    return 'first' if prompt in first else 'second' if prompt in second else 'tie'\n"
        "def wrong(prompt, first, second):\n    return 'A'\n"
        "def nan(prompt, first, second):\n    return float('nan'), 0.0\n"
        "def nothing(prompt, first, second):\n    pass\n"
        "def one(prompt, first, second):\n    return torch.tensor(1.0)\n"
        "def three(prompt, first, second):\n    return [1, 2, 3]\n"
        "def none_of_two(prompt, first, second):\n    return None, 1.0\n"
        "def array(prompt, first, second):\n    return np.array([len(first), len(second)])\n"
        "def tensor(prompt, first, second):\n    return torch.tensor([len(first), len(second)])\n"
        "def numbers(prompt, first, second):\n    return np.float32(len(first)), np.int64(len(second))\n"
        "def raising(prompt, first, second):\n    return second.index('zz')\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_judges"


def rulings(name: str, *answers: tuple[str, str], prompt: str = "x") -> list[Ruling]:
    found = by_function(name)([Contest((Message("user", prompt),), a, b) for a, b in answers])
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]


def test_a_judge_that_prefers_a_position_decides_nothing(judges: str) -> None:
    (found,) = rulings(f"{judges}:first", ("one", "other"))
    assert (found.winner, found.orders) == ("tie", ("a", "b"))


def test_scores_are_means_over_both_orders(judges: str) -> None:
    one, other, same = rulings(f"{judges}:longer", ("yes", "no"), ("no", "yes"), ("on", "no"))
    assert (one.winner, one.scores) == ("a", (3.0, 2.0))
    assert (other.winner, other.scores) == ("b", (2.0, 3.0))
    assert (same.winner, same.orders) == ("tie", ("tie", "tie"))
    # A lean of 1.5 to what stands first turns a difference of 1, and not one of 2.
    near, far = rulings(f"{judges}:leaning", ("yes", "no"), ("yes!", "no"))
    assert (near.winner, near.orders, near.scores) == ("tie", ("a", "b"), (3.75, 2.75))
    assert (far.winner, far.orders) == ("a", ("a", "a"))


def test_the_judge_sees_the_prompt(judges: str) -> None:
    assert [each.winner for each in rulings(f"{judges}:right", ("six", "two"), ("two", "six"), prompt="six")] == [
        "a",
        "b",
    ]
    assert prompt_text((Message("system", "be kind"), Message("user", "hello"))) == "system: be kind\n\nuser: hello"


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("wrong", "'A'; expected \"first\""),
        ("nan", "(nan, 0.0); expected"),
        ("nothing", "None; expected"),
        ("one", "tensor(1.); expected"),
        ("three", "[1, 2, 3]; expected"),
        ("none_of_two", "(None, 1.0); expected"),
    ],
)
def test_a_judge_s_invalid_answers_are_refused(judges: str, name: str, summary: str) -> None:
    with pytest.raises(UserError, match=f"judge own_judges:{name}: returned") as caught:
        rulings(f"{judges}:{name}", ("one", "other"))
    assert summary in str(caught.value)
    assert str(caught.value).endswith("\n    for the prompt 'x'")
    with pytest.raises(UserError, match="has no function nobody"):
        by_function(f"{judges}:nobody")


@pytest.mark.parametrize("name", ["longer", "array", "tensor", "numbers"])
def test_two_scores_may_be_numbers_of_numpy_and_torch(judges: str, name: str) -> None:
    (found,) = rulings(f"{judges}:{name}", ("yes", "no"))
    assert (found.winner, found.orders, found.scores) == ("a", ("a", "a"), (3.0, 2.0))


def test_an_exception_of_a_judge_is_reported_with_its_prompt(judges: str) -> None:
    with pytest.raises(
        UserError, match=r"judge own_judges:raising: raised ValueError at .*own_judges.py:\d+: "
    ) as told:
        rulings(f"{judges}:raising", ("one", "other"), prompt="where is it")
    assert str(told.value).endswith("\n    for the prompt 'where is it'")
