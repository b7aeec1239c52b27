"""Environments and a parser of a user's own, for tests: correct ones, and one for each mistake."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated, Any, Literal, Optional

from pydantic import Field

from loopos.data.tool_calls import Part, ToolCall


def any_text(text: str, start: int, ended: bool) -> Part | None:
    """Every turn is a call of `count`."""
    return Part(len(text), calls=(ToolCall("count", {"text": text}),)) if ended else None


class Shop:
    """A shop with tools of many types."""

    def reset(self, goal: str, budget: int = 9) -> list[dict[str, Any]]:
        self.cart: list[str] = []
        self.budget = budget
        return [{"role": "user", "content": goal}]

    def buy(
        self,
        item: str,
        number: int = 1,
        color: Literal["red", "blue"] = "red",
        notes: list[str] | None = None,
        weight: Annotated[float, Field(gt=0)] = 1.0,
    ) -> dict[str, Any]:
        """Buys an item.

        It goes into the cart.

        Args:
            item: What to buy, by
                its name.
            number (int): How many.
            color: Of the item.

        Returns:
            The cart.
        """
        self.cart += [item] * number
        return {"cart": self.cart, "color": color}

    def copy(self, schema: Optional[str] = None) -> None:  # noqa: UP045
        """Copies the cart."""

    def _hidden(self) -> None: ...

    def reward(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> float:
        return float(len(self.cart))


class Counter:
    """Counts the characters of every turn."""

    def reset(self, prompt: str) -> str:
        self.seen = 0
        return prompt

    def count(self, text: str) -> str:
        """Counts characters."""
        self.seen += 1
        return f"{len(text)} of turn {self.seen}"


class Trouble:
    """Tools that go wrong."""

    def reset(self, prompt: str) -> str:
        self.done = False
        return prompt

    def fail(self) -> str:
        """Raises."""
        raise RuntimeError("no\nparcel")

    def leave(self) -> str:
        """Ends the program."""
        raise SystemExit(3)

    def loop(self) -> str:
        """Never ends, and swallows exceptions."""
        while True:
            with suppress(Exception):
                time.sleep(0.001)

    def long(self) -> str:
        """Writes much."""
        return "x" * 100_000

    def slow(self) -> str:
        """Takes a while."""
        time.sleep(0.05)
        return "slept"

    def stop(self) -> str:
        """Ends the episode."""
        self.done = True
        return "stopped"


class NoTools:
    def reset(self, prompt: str) -> str:
        return prompt

    def reward(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
        return row.get("score")  # type: ignore[return-value]


class NoHint:
    def reset(self) -> str:
        return "x"

    def buy(self, item) -> str:  # type: ignore[no-untyped-def]
        """Buys."""
        return ""


class NoDocstring:
    def reset(self) -> str:
        return "x"

    def buy(self, item: str) -> str:
        return ""


class WrongDocstring:
    def reset(self) -> str:
        return "x"

    def buy(self, item: str) -> str:
        """Buys.

        Args:
            thing: What.
        """
        return ""


class Stars:
    def reset(self) -> str:
        return "x"

    def buy(self, *items: str) -> str:
        """Buys."""
        return ""


class NoSchema:
    def reset(self) -> str:
        return "x"

    def buy(self, item: time.struct_time) -> str:
        """Buys."""
        return ""


class UnknownHint:
    def reset(self) -> str:
        return "x"

    def buy(self, item: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
        """Buys."""
        return ""


class NoReset:
    def buy(self, item: str) -> str:
        """Buys."""
        return ""


class BadReset:
    def reset(self, kind: str) -> Any:
        if kind == "raises":
            raise KeyError("kind")
        return {"none": None, "role": [{"role": "king", "content": "x"}], "number": 3}[kind]


def any_guess(text: str, start: int, ended: bool) -> Part | None:
    """Every turn is a call of `guess` with its length."""
    return Part(len(text), calls=(ToolCall("guess", {"number": len(text)}),)) if ended else None


class Guess:
    """Guesses a number, of which a tool says whether it is higher."""

    def reset(self, goal: str, secret: int) -> str:
        self.secret, self.near = secret, 0.0
        return goal

    def guess(self, number: int) -> str:
        """Compares a guess with the secret number.

        Args:
            number: The guess.
        """
        self.near = max(self.near, 1 / (1 + abs(number - self.secret)))
        return "higher" if number < self.secret else "lower" if number > self.secret else "right"

    def reward(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> float:
        return self.near


class SlowGuess(Guess):
    """Guesses with a tool that takes a moment."""

    def guess(self, number: int) -> str:
        """Compares a guess with the secret number, slowly.

        Args:
            number: The guess.
        """
        time.sleep(0.01)
        return super().guess(number)


def num_results(prompts: list[str], responses: list[str], messages: list[list[dict[str, Any]]]) -> list[float]:
    """The number of results of tools."""
    return [float(sum(message["role"] == "tool" for message in each)) for each in messages]
