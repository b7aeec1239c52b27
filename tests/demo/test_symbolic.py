"""The generated tasks: every answer recomputed from only its problem, every chain followed, splits that do not overlap."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loopos.data.rows import read
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import read_supervised
from loopos.demo.symbolic import TASKS, Task, addition, coin_flips, last_letters, split_of, symbolic_items, write_items


def test_items_as_written() -> None:
    name = last_letters(["Elon", "Musk"])
    assert name.problem == 'Take the last letters of the words in "Elon Musk" and concatenate them.'
    assert name.steps == ('"Elon" ends with "n": n', '"Musk" ends with "k": nk')
    assert name.answer == "nk"
    coin = coin_flips([("Ka", True), ("Sherrie", False), ("Ida", True)])
    assert coin.problem == (
        "A coin is heads up. Ka flips the coin. Sherrie does not flip the coin. Ida flips the coin. "
        "Is the coin still heads up?"
    )
    assert coin.steps == (
        "The coin starts heads up.", "Ka flips: tails up.", "Sherrie does not flip: tails up.", "Ida flips: heads up."
    )  # fmt: skip
    assert coin.answer == "yes"
    total = addition(457, 86)
    assert total.problem == "What is 457 + 86?"
    assert total.steps == (
        "7 + 6 = 13, carry 1: 3", "5 + 8 + 1 = 14, carry 1: 43", "4 + 0 + 1 = 5, carry 0: 543"
    )  # fmt: skip
    assert total.answer == "543"
    assert addition(99, 1).steps[-1] == "carry 1: 100"


def recomputed(problem: str) -> str:
    """The answer by another way than the generator's."""
    if problem.startswith("What is"):
        return str(sum(map(int, re.findall(r"\d+", problem))))
    if problem.startswith("Take"):
        quoted = problem.split('"')[1]
        return "".join(re.findall(r"(\w)\b", quoted)).lower()
    flips = len(re.findall(r"\w+ flips the coin", problem))
    return "yes" if flips % 2 == 0 else "no"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_every_answer_is_right_and_the_chain_ends_with_it(task: Task, size: int) -> None:
    items = symbolic_items(20 if size == 1 else 150, task, size=size, seed=5)
    for item in items:
        assert item.answer == recomputed(item.problem)
        side = {"yes": "heads", "no": "tails"}.get(item.answer, item.answer)
        assert re.search(rf"\b{side}( up\.)?$", item.steps[-1])
    assert len({item.problem for item in items}) == len(items)


def test_each_column_of_an_addition_is_right() -> None:
    columns = 0
    for item in symbolic_items(100, "additions", size=4):
        for step in item.steps:
            if found := re.fullmatch(r"([\d +]+) = (\d+), carry (\d): \d+", step):
                sides, result, carry = found.groups()
                assert sum(map(int, sides.split(" + "))) == int(result)
                assert int(result) // 10 == int(carry)
                assert step.split(": ")[1][0] == result[-1]
                columns += 1
    assert columns == 400


@pytest.mark.parametrize("task", TASKS)
def test_training_and_test_never_meet_whatever_the_seeds(task: Task) -> None:
    size = 2
    train = {item.problem for seed in range(3) for item in symbolic_items(60, task, size=size, seed=seed)}
    test = {item.problem for seed in range(3) for item in symbolic_items(60, task, size=size, split="test", seed=seed)}
    assert min(len(train), len(test)) > 60
    assert not train & test


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_items(task: Task) -> None:
    assert symbolic_items(30, task, seed=7) == symbolic_items(30, task, seed=7)
    assert symbolic_items(30, task, seed=7)[:10] == symbolic_items(10, task, seed=7)
    assert symbolic_items(30, task, seed=7) != symbolic_items(30, task, seed=8)
    assert {split_of(item) for item in symbolic_items(30, task)} == {"train"}


def test_both_answers_to_a_coin_are_about_as_frequent() -> None:
    yes = sum(item.answer == "yes" for item in symbolic_items(400, "coin_flips"))
    assert 160 <= yes <= 240


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="hardly more than"):
        symbolic_items(1000, "additions", size=1)
    with pytest.raises(ValueError, match="size of at least 1"):
        symbolic_items(1, "additions", size=0)


def test_items_are_demonstrations(tmp_path: Path) -> None:
    items = symbolic_items(5, "last_letters")
    path = tmp_path / "items.jsonl"
    write_items(path, items)
    examples, report = read_supervised(read(str(path)), {}, step_format=NAMED_FORMATS["think"])
    assert report.used == 5
    assert [(example.problem, example.steps, example.answer) for example in examples] == [  # type: ignore[union-attr]
        (item.problem, item.steps, item.answer) for item in items
    ]
    write_items(path, items, with_steps=False)
    assert [json.loads(line)["reasoning"] for line in path.read_text().splitlines()] == [[]] * 5
