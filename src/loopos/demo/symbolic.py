"""Symbolic tasks with known steps: last letters, coin flips, additions with carries.

The tasks are those of Wei et al. 2022 (sections 3 and 5); names and numbers are generated here, none are taken from
their data. The same arguments give the same items. A hash of the problem assigns it to training or test, so the two
never share a problem, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Task: TypeAlias = Literal["last_letters", "coin_flips", "additions"]
Split: TypeAlias = Literal["train", "test"]

TASKS: tuple[Task, ...] = ("last_letters", "coin_flips", "additions")
DEFAULT_SIZES: dict[Task, int] = {"last_letters": 3, "coin_flips": 4, "additions": 3}
"""Words of a name, people at the coin, digits of a summand."""

# One item in this many is a test item.
_TEST_SHARE = 4
_NAMES = """
    Ada Alma Amir Anton Bruno Carla Cyrus Dana Diego Edith Elias Emil Erik Felix Flora Frank Greta Hana Hugo Ida
    Igor Ines Iris Ivan Jakob Jana Jonas Judith Klaus Lara Leon Lina Louis Magda Marek Mira Nadia Nils Nora Olga
    Oscar Paul Petra Rita Robin Ruth Selma Simon Sofia Sven Theo Tomas Vera Viktor Wanda Yusuf Zeno
"""


@dataclass(frozen=True, slots=True)
class SymbolicItem:
    """One problem with the steps that solve it and its answer."""

    task: Task
    problem: str
    steps: tuple[str, ...]
    answer: str


def last_letters(names: Sequence[str]) -> SymbolicItem:
    """The last letters of some words, put together: one step a word, with the letters so far."""
    steps, letters = [], ""
    for name in names:
        letters += name[-1].lower()
        steps.append(f'"{name}" ends with "{name[-1].lower()}": {letters}')
    problem = f'Take the last letters of the words in "{" ".join(names)}" and concatenate them.'
    return SymbolicItem("last_letters", problem, tuple(steps), letters)


def coin_flips(people: Sequence[tuple[str, bool]]) -> SymbolicItem:
    """Which way a coin lies that each person flips or does not: one step a person, with the side that is up."""
    heads = True
    sentences, steps = [], ["The coin starts heads up."]
    for name, flips in people:
        heads ^= flips
        sentences.append(f"{name} {'flips' if flips else 'does not flip'} the coin.")
        steps.append(f"{name} {'flips' if flips else 'does not flip'}: {'heads' if heads else 'tails'} up.")
    problem = f"A coin is heads up. {' '.join(sentences)} Is the coin still heads up?"
    return SymbolicItem("coin_flips", problem, tuple(steps), "yes" if heads else "no")


def addition(first: int, second: int) -> SymbolicItem:
    """The sum of two numbers >= 0, as on paper: one step a column from the right, with the digits so far."""
    assert first >= 0, first
    assert second >= 0, second
    steps, digits, carry = [], "", 0
    width = max(len(str(first)), len(str(second)))
    for top, bottom in zip(reversed(str(first).zfill(width)), reversed(str(second).zfill(width)), strict=True):
        column = int(top) + int(bottom) + carry
        method_state = f" + {carry}" if carry else ""
        digits, carry = str(column % 10) + digits, column // 10
        steps.append(f"{top} + {bottom}{method_state} = {column}, carry {carry}: {digits}")
    if carry:
        digits = str(carry) + digits
        steps.append(f"carry {carry}: {digits}")
    return SymbolicItem("additions", f"What is {first} + {second}?", tuple(steps), digits)


def symbolic_items(
    number: int, task: Task, *, size: int | None = None, split: Split = "train", seed: int = 0
) -> list[SymbolicItem]:
    """`number` different items of a task, in an order that the seed decides.

    size: words, people, or digits of each summand; the task's default if None. Raises ValueError for a size below 1,
    or where the task has fewer items of that size than are asked for.
    """
    size = DEFAULT_SIZES[task] if size is None else size
    if size < 1 or number < 0:
        raise ValueError(f"{number} items of size {size}: expected at least 0 items, of a size of at least 1")
    generator = random.Random(f"{task} {size} {seed}")
    found: dict[str, SymbolicItem] = {}
    since_new = 0
    while len(found) < number:
        item = _DRAWS[task](generator, size)
        if item.problem in found or split_of(item) != split:
            since_new += 1
            if since_new > 20_000:
                raise ValueError(f"{number} items of {task} of size {size}: there are hardly more than {len(found)}")
            continue
        found[item.problem], since_new = item, 0
    return list(found.values())


def split_of(item: SymbolicItem) -> Split:
    """The side that an item is always on."""
    digest = hashlib.sha256(item.problem.encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def write_items(path: Path, items: Sequence[SymbolicItem], *, with_steps: bool = True) -> None:
    """Writes items as JSON Lines with problem, reasoning and answer; without steps, the reasoning is an empty list."""
    lines = [
        json.dumps(
            {
                "problem": item.problem,
                "reasoning": list(item.steps) if with_steps else [],
                "answer": item.answer,
                "task": item.task,
            }
        )
        for item in items
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _draw_last_letters(generator: random.Random, size: int) -> SymbolicItem:
    return last_letters(generator.sample(_NAMES.split(), size))


def _draw_coin_flips(generator: random.Random, size: int) -> SymbolicItem:
    return coin_flips([(name, generator.random() < 0.5) for name in generator.sample(_NAMES.split(), size)])


def _draw_addition(generator: random.Random, size: int) -> SymbolicItem:
    """Two numbers of `size` digits with a carry in some column, as most have; others are drawn again."""
    lowest = 10 ** (size - 1) if size > 1 else 0
    while True:
        first, second = (generator.randrange(lowest, 10**size) for _ in range(2))
        if any(int(a) + int(b) > 9 for a, b in zip(str(first), str(second), strict=True)):
            return addition(first, second)


_DRAWS: dict[Task, Callable[[random.Random, int], SymbolicItem]] = {
    "last_letters": _draw_last_letters,
    "coin_flips": _draw_coin_flips,
    "additions": _draw_addition,
}
