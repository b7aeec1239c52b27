"""Classes of environments: schemas from hints and docstrings, arguments, resets, and mistakes by name; those that come along."""

from __future__ import annotations

import pytest

from loopos.config.diagnostics import UserError
from loopos.data.conversations import Message
from loopos.data.tool_calls import ToolCall
from loopos.rl.environments import ArgumentError, EnvironmentClass
from loopos.rl.packaged_environments import CalculatorSearch, TreasureGrid, calculated

OWN = "tests.rl.own_environments"


def test_schemas_are_made_of_hints_and_docstrings() -> None:
    shop = EnvironmentClass(f"{OWN}:Shop")
    buy, copy = shop.schemas
    assert buy == {
        "type": "function",
        "function": {
            "name": "buy",
            "description": "Buys an item. It goes into the cart.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": "What to buy, by its name."},
                    "number": {"type": "integer", "description": "How many."},
                    "color": {"type": "string", "enum": ["red", "blue"], "description": "Of the item."},
                    "notes": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                    "weight": {"type": "number", "exclusiveMinimum": 0},
                },
                "required": ["item"],
            },
        },
    }
    # Names that pydantic's models use themselves.
    assert list(copy["function"]["parameters"]["properties"]) == ["schema"]
    assert "_hidden" not in shop.tools


def test_arguments_are_checked_by_the_hints() -> None:
    shop = EnvironmentClass(f"{OWN}:Shop")
    state, messages = shop.begin({"goal": "a lamp", "other": 3}, "row 1")
    assert messages == [Message("user", "a lamp")]
    assert shop.call(state, ToolCall("buy", {"item": 7, "number": "2"})) == {"cart": ["7", "7"], "color": "red"}
    with pytest.raises(ArgumentError, match="item: Field required"):
        shop.call(state, ToolCall("buy", {}))
    with pytest.raises(
        ArgumentError, match="color: Input should be 'red' or 'blue'; size: Extra inputs are not permitted"
    ):
        shop.call(state, ToolCall("buy", {"item": "lamp", "color": "green", "size": 3}))
    assert shop.reward(state, messages, {}, "row 1") == 2.0


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("NoHint", "the tool buy has no type hint for item; expected a hint such as item: str"),
        ("NoDocstring", "the tool buy has no docstring; expected one that says what it does"),
        ("WrongDocstring", "the tool buy documents thing, which is no parameter"),
        ("Stars", "the tool buy has the parameter *items: 'str'; expected parameters that are passed by name"),
        ("NoSchema", "the tool buy has a type hint without a JSON Schema"),
        ("UnknownHint", "the tool buy has a type hint that cannot be read (name 'Missing' is not defined)"),
        ("NoReset", "expected a class with a method reset"),
        ("Missing", "has no attribute 'Missing'"),
    ],
)
def test_mistakes_of_a_class(name: str, piece: str) -> None:
    with pytest.raises(UserError) as caught:
        EnvironmentClass(f"{OWN}:{name}")
    assert piece in str(caught.value)
    assert f"{OWN}:{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        ({}, "reset needs the column kind; the row has none"),
        ({"kind": "raises"}, "reset: raised KeyError"),
        ({"kind": "none"}, "reset returned 'None'; expected a text, or messages such as"),
        ({"kind": "number"}, "reset returned '3'; expected a text"),
        ({"kind": "role"}, "message 0.role: got 'king'"),
    ],
)
def test_mistakes_of_a_reset(row: dict[str, object], piece: str) -> None:
    with pytest.raises(UserError) as caught:
        EnvironmentClass(f"{OWN}:BadReset").begin(row, "prompts.jsonl:4")
    assert piece in str(caught.value)
    assert "for prompts.jsonl:4" in str(caught.value)


def test_rewards_are_numbers_or_none() -> None:
    environment = EnvironmentClass(f"{OWN}:NoTools")
    state, messages = environment.begin({"prompt": "x"}, "row 1")
    assert [environment.reward(state, messages, row, "row 1") for row in ({"score": 2}, {})] == [2.0, None]
    with pytest.raises(UserError, match=r"reward: returned .*nan.*; expected a finite number, or None"):
        environment.reward(state, messages, {"score": float("nan")}, "row 1")


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 + 3 * 4", 14), ("(8849 - 4806) / 2", 2021.5), ("2 ** 10", 1024), ("2^10", 1024), ("-7 // 2", -4), ("sqrt(16) + max(1, 2)", 6.0)],
)  # fmt: skip
def test_arithmetic(expression: str, value: float) -> None:
    assert calculated(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('x')", "().__class__", "9 ** 9 ** 9", "10 ** 400", "1 / 0", "[1] * 9", "'a' * 3", "x + 1",
     "lambda: 1", "sqrt(-1)", "2 +", "(-8) ** 0.5", "1e308 * 10", "round(1, ndigits=1)", "1 if 1 else 2", "True + 1",
     "(" * 150, "9" * 201, "min()", "abs(1, 2)", "1_0" + "0" * 90],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError):
        calculated(expression)


def test_calculator_and_search() -> None:
    environment = EnvironmentClass("calculator_search")
    assert list(environment.tools) == ["calculate", "search"]
    rows = CalculatorSearch.rows(200, seed=1)
    assert rows == CalculatorSearch.rows(200, seed=1) != CalculatorSearch.rows(200, seed=2)
    state, _ = environment.begin(rows[0], "row 1")
    assert environment.call(state, ToolCall("search", {"query": "height of Mont Blanc", "limit": 1})) == [
        "The height of Mont Blanc is 4806 meters."
    ]
    assert environment.call(state, ToolCall("search", {"query": "zebra"})) == []
    row = {"question": "", "answer": "4043"}
    thought = "<think>\n4806 - 763 = 4043\n</think>\n"
    cases = ("The answer is\n4043", 1.0), ("4044", 0.0), ("", 0.0), (thought + "4043", 1.0), (thought + "4044", 0.0)
    for text, score in cases:
        assert environment.reward(state, [Message("assistant", text)], row, "row 1") == score
    # Every question is answered by its facts: the tools find both.
    for row in rows[:50]:
        words = row["question"].replace("?", "")
        assert len(environment.call(state, ToolCall("search", {"query": words, "limit": 2}))) == 2  # type: ignore[arg-type]


def test_the_treasure_is_found_in_the_fewest_moves() -> None:
    environment = EnvironmentClass("treasure_grid")
    assert list(environment.tools) == ["move", "dig"]
    for row in TreasureGrid.rows(20):
        state, messages = environment.begin(row, "row")
        assert "grid of 4 x 4 squares" in messages[0].content
        texts: list[object] = []
        for direction in ("north", "south", "east", "west"):
            for _ in range(4):
                before = state._distance()
                texts.append(environment.call(state, ToolCall("move", {"direction": direction})))
                if state._distance() >= before:
                    opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}[direction]
                    if "ends here" not in str(texts[-1]):
                        environment.call(state, ToolCall("move", {"direction": opposite}))
                    break
        assert environment.call(state, ToolCall("dig", {})) == "You found the treasure."
        assert state.done
        assert 0.5 < environment.reward(state, messages, row, "row") <= 1.0  # type: ignore[operator]
    state, messages = environment.begin({"seed": 1}, "row")
    assert environment.call(state, ToolCall("dig", {})) == "There is nothing here."
    assert environment.reward(state, messages, {}, "row") == 0.0
