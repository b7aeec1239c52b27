"""The environments that come along: questions for search and a calculator, and a game on a grid with hidden treasure.

Both make rows of their own, by `rows(number, seed)`, so that they can be tried without data.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from loopos.rl.reward_functions import numeric_answer

_LONGEST_EXPRESSION = 200
_LARGEST_BITS = 256
_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
}


def calculated(expression: str) -> int | float:
    """The value of an arithmetic expression: numbers, + - * / // % **, parentheses, sqrt, abs, round, min and max.

    Nothing else is evaluated, and numbers stay below 2^256. Raises `ValueError` that says what is wrong.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(expression)} characters; at most {_LONGEST_EXPRESSION}")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError) as problem:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from problem
    except ZeroDivisionError as problem:
        raise ValueError("division by zero") from problem
    except (OverflowError, TypeError) as problem:
        raise ValueError(f"{expression!r} has no value ({problem})") from problem


def _value(node: ast.expr) -> int | float:
    found: Any
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            found = node.value
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            found = _OPERATORS[type(node.op)](_value(node.operand))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _value(node.left), _value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) * math.log2(max(abs(left), 2)) > _LARGEST_BITS:
                raise ValueError("the power is too large")
            found = _OPERATORS[type(node.op)](left, right)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            found = _FUNCTIONS[name](*(_value(each) for each in node.args))
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")
    if isinstance(found, complex) or not math.isfinite(found) or abs(found) >= 2**_LARGEST_BITS:
        raise ValueError("the result is no finite real number below 2^256")
    return found  # type: ignore[no-any-return]


@cache
def _facts() -> tuple[dict[str, Any], ...]:
    text = (files("loopos.rl") / "facts.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def _sentence(fact: Mapping[str, Any]) -> str:
    unit = f" {fact['unit']}" if fact["unit"] else ""
    return f"The {fact['quantity']} of {fact['name']} is {fact['value']}{unit}."


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class CalculatorSearch:
    """Questions that need facts from a small corpus and arithmetic with them: tools search and calculate."""

    def reset(self, question: str) -> list[dict[str, str]]:
        """The question as the user's message."""
        return [{"role": "user", "content": f"{question} Write the answer as the last line."}]

    def calculate(self, expression: str) -> str:
        """Computes an arithmetic expression.

        Args:
            expression: Numbers with + - * / // % **, parentheses, sqrt, abs, round, min or max.
        """
        value = calculated(expression)
        return f"{value:.10g}" if isinstance(value, float) else str(value)

    def search(self, query: str, limit: int = 3) -> list[str]:
        """Finds facts about mountains, rivers, planets, elements and buildings.

        Args:
            query: Words of the fact.
            limit: How many facts at most, up to 5.
        """
        texts = [_sentence(fact) for fact in _facts()]
        counts = [Counter(_words(text)) for text in texts]
        found = Counter(word for words in counts for word in words)
        scores = [
            sum(math.log(1 + len(texts) / found[word]) for word in set(_words(query)) if word in words)
            for words in counts
        ]
        best = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
        return [texts[index] for index in best[: max(1, min(limit, 5))] if scores[index] > 0]

    def reward(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
        """1 if the last message states the row's answer."""
        last = messages[-1]
        if last["role"] != "assistant" or not last["content"]:
            return 0.0
        return numeric_answer([], [last["content"]], [row])[0]

    @classmethod
    def rows(cls, number: int, seed: int = 0) -> list[dict[str, Any]]:
        """Rows with question and answer: sums, differences and products of two facts of one kind."""
        draw = random.Random(seed)
        kinds: dict[str, list[dict[str, Any]]] = {}
        for fact in _facts():
            kinds.setdefault(fact["quantity"], []).append(fact)
        rows = []
        for _ in range(number):
            quantity = draw.choice(list(kinds))
            one, other = draw.sample(kinds[quantity], 2)
            wording, answer = draw.choice(
                [
                    (f"the sum of the {quantity} of {{}} and that of {{}}", one["value"] + other["value"]),
                    (f"the {quantity} of {{}} minus that of {{}}", one["value"] - other["value"]),
                    (f"the {quantity} of {{}} times that of {{}}", one["value"] * other["value"]),
                ]
            )
            unit = f" in {one['unit']}" if one["unit"] else ""
            question = f"What is {wording.format(one['name'], other['name'])}{unit}?"
            rows.append({"question": question, "answer": str(answer)})
        return rows


_STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


class TreasureGrid:
    """A game: find the treasure on a grid by its distance, with as few moves as possible, and dig there once."""

    def reset(self, seed: int, size: int = 4) -> str:
        """A grid of `size` × `size` squares; `seed` places player and treasure on two of them."""
        squares = [(x, y) for x in range(size) for y in range(size)]
        (self._x, self._y), self._treasure = random.Random(seed).sample(squares, 2)
        self._size, self._shortest, self._moves = size, 0, 0
        self._shortest = self._distance()
        self.done, self._found = False, False
        return (
            f"You stand on a grid of {size} x {size} squares, at east {self._x}, north {self._y}. A treasure is hidden "
            f"{self._distance()} moves away. Walk to it and dig."
        )

    def move(self, direction: Literal["north", "south", "east", "west"]) -> str:
        """Moves one square, and tells how far the treasure is.

        Args:
            direction: Where to go.
        """
        east, north = _STEPS[direction]
        x, y = self._x + east, self._y + north
        if not (0 <= x < self._size and 0 <= y < self._size):
            return f"The grid ends here. The treasure is {self._distance()} moves away."
        self._x, self._y, self._moves = x, y, self._moves + 1
        return f"You are at east {x}, north {y}. The treasure is {self._distance()} moves away."

    def dig(self) -> str:
        """Digs on your square, which ends the game."""
        self.done, self._found = True, self._distance() == 0
        return "You found the treasure." if self._found else "There is nothing here."

    def reward(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
        """0 without the treasure; with it the fewest possible moves over those made, between 0.5 and 1."""
        if not self._found:
            return 0.0
        return 0.5 + 0.5 * self._shortest / max(self._moves, self._shortest, 1)

    @classmethod
    def rows(cls, number: int, seed: int = 0, size: int = 4) -> list[dict[str, Any]]:
        """Rows with a seed for each game."""
        return [{"seed": seed * number + index, "size": size} for index in range(number)]

    def _distance(self) -> int:
        return abs(self._x - self._treasure[0]) + abs(self._y - self._treasure[1])
