"""Rows that environments make for themselves, as a source of data."""

from __future__ import annotations

import pytest

from loopos.config.diagnostics import DataError, UserError
from loopos.config.variants import ENVIRONMENTS
from loopos.data.rows import read
from loopos.rl.packaged_environments import CalculatorSearch, TreasureGrid


def values(source: str) -> list[dict[str, object]]:
    return [dict(row.values) for row in read(source)]


def test_rows_are_those_of_the_class() -> None:
    assert values("environment:calculator_search?number=3&seed=5") == CalculatorSearch.rows(3, 5)
    assert values("environment:treasure_grid?number=2&size=6") == TreasureGrid.rows(2, 0, 6)
    assert len(values("environment:calculator_search")) == 500


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("environment:calculator", "the environment 'calculator'; expected an environment.*\n?.*calculator_search"),
        ("environment:treasure_grid?nmber=2", "the setting 'nmber'; expected one of number, seed, size"),
    ],
)
def test_mistakes(source: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        values(source)


def test_an_environment_without_rows_and_one_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        def reset(self) -> str:
            return "hello"

    class Broken(Bare):
        @classmethod
        def rows(cls, number: int, seed: int) -> list[object]:
            return [{"a": object()}]

    row = type(ENVIRONMENTS["treasure_grid"])
    monkeypatch.setattr(row, "load", lambda self: Bare)
    with pytest.raises(DataError, match="treasure_grid, which makes no rows"):
        values("environment:treasure_grid")
    monkeypatch.setattr(row, "load", lambda self: Broken)
    with pytest.raises(UserError, match="expected dicts of JSON values"):
        values("environment:treasure_grid")
