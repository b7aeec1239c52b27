"""Checkers by name, those of other packages where they are installed, and a user's own function."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.data.step_format import NAMED_FORMATS
from loopos.evaluation.checkers import Sample, checker, judge


def test_our_checkers_by_name() -> None:
    assert checker("auto")("42.0", "42", {}) == 1.0
    assert checker("exact")("42.0", "42", {}) == 0.0
    assert checker("numeric", tolerance=0.1)("45", "42", {}) == 1.0
    assert checker("choice")("(b)", "B", {}) == 1.0
    with pytest.raises(UserError, match="got fuzzy, expected one of auto, exact"):
        checker("fuzzy")


@pytest.mark.parametrize("name", ["math_verify", "reasoning_gym"])
def test_a_missing_package_is_reported_with_its_install_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingRequirement, match=r'pip install -e "\.\[rewards\]"'):
        checker(name)


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    check = checker("math_verify")
    assert check(r"\boxed{\frac{1}{2}}", "0.5", {}) == 1.0
    assert check("$x + 1$", "$1 + x$", {}) == 1.0
    assert check("3", "4", {}) == 0.0
    assert check("blue", "Blue", {}) == 1.0


def stand_in(answer: str, entry: dict[str, object]) -> float:
    return 1.0 if answer == entry["answer"] else 0.25


def test_reasoning_gym_takes_the_scorer_of_the_row_s_task(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("reasoning_gym")
    package.get_score_answer_fn = {"leg_counting": stand_in}.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    check = checker("reasoning_gym")
    row: dict[str, object] = {"metadata": {"source_dataset": "leg_counting"}}
    assert check("8", "8", row) == 1.0
    assert check("7", "8", {"metadata": '{"source_dataset": "leg_counting"}'}) == 0.25
    with pytest.raises(UserError, match=r"without metadata\.source_dataset"):
        check("8", "8", {})


def test_the_real_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    (entry,) = gym.create_dataset("leg_counting", size=1, seed=1)
    check = checker("reasoning_gym")
    assert check(entry["answer"], entry["answer"], entry) == 1.0
    assert check("-1", entry["answer"], entry) < 1.0


def test_a_user_s_function_runs_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_checks.py").write_text(
        "def ends(answer, expected, row):\n    return answer.endswith(expected) and row['kind'] == 'x'\n"
        "def half(answer, expected, row):\n    return 0.5\n"
        "def bad(answer, expected, row):\n    return 'yes'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert checker("own_checks:ends")("abc", "c", {"kind": "x"}) == 1.0
    assert checker("own_checks:ends")("abc", "c", {"kind": "y"}) == 0.0
    assert checker("own_checks:half")("abc", "c", {}) == 0.5
    with pytest.raises(
        UserError,
        match="returned 'yes'; expected true, false or a number from 0 to 1\n    for the answer 'a' where 'b' is",
    ):
        checker("own_checks:bad")("a", "b", {})
    with pytest.raises(UserError, match="own_checks has no function number"):
        checker("own_checks:number")
    with pytest.raises(UserError, match="cannot import no_such_module"):
        checker("no_such_module:f")


def test_what_a_checker_returns_and_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_checks")
    monkeypatch.setitem(sys.modules, "own_checks", module)
    for returned, score in (
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (torch.tensor(1), 1.0),
        (Fraction(1, 2), 0.5),
    ):
        module.own = lambda answer, expected, row, returned=returned: returned  # type: ignore[attr-defined]
        assert checker("own_checks:own")("a", "b", {}) == score
    for refused in (None, math.nan, 1.5, -1, "1", [1.0, 0.0], np.float64(np.inf)):
        module.own = lambda answer, expected, row, refused=refused: refused  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"^checker own_checks:own: returned .*; expected true, false or a number"):
            checker("own_checks:own")("a", "b", {})

    def raises(answer: str, expected: str, row: dict[str, object]) -> bool:
        return bool(row["missing"])

    module.own = raises  # type: ignore[attr-defined]
    samples = [Sample("<think>\na\n</think>\n7", 5, True)]
    with pytest.raises(UserError) as told:
        judge(
            samples,
            "8",
            {},
            step_format=NAMED_FORMATS["think"],
            checker=checker("own_checks:own"),
            location="t.jsonl:3",
        )
    first, second = str(told.value).splitlines()
    assert first.startswith("t.jsonl:3: checker own_checks:own: raised KeyError at ")
    assert second == "    for the answer '7' where '8' is expected"
