"""The checkers of answers by name: ours, those of other packages, and a user's own function.

Enters: the name that a config or a command gives. Leaves: a `Checker`, which scores one answer from 0 to 1; 1 is right.
A user's code runs only where it is asked for by name ("module:function"). Left out: what ours do (`answers`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

from loopos.config.extras import install_command
from loopos.config.faults import EnvironmentFault, UserError
from loopos.data.record import shown
from loopos.evaluation.answers import automatic, choice, exact, numeric
from loopos.evaluation.own_code import number_of, own_function

Checker: TypeAlias = Callable[[str, str, Mapping[str, object]], float]
"""(answer, wanted answer, the row of data) → score."""

NAMES = ("auto", "exact", "numeric", "choice", "math_verify", "reasoning_gym")
RIGHT = 1.0
"""The score from which an answer counts as right."""


def checker(name: str, *, tolerance: float = 1e-6) -> Checker:
    """The checker of a name: one of `NAMES`, or "module:function", called as `function(answer, wanted, row)`.

    tolerance: relative error at which numbers count as equal (auto and numeric). Raises `UserError` for a name of no
    checker, `EnvironmentFault` for a package that is not installed.
    """
    match name:
        case "auto":
            return lambda answer, wanted, row: float(automatic(answer, wanted, tolerance=tolerance))
        case "exact":
            return lambda answer, wanted, row: float(exact(answer, wanted))
        case "numeric":
            return lambda answer, wanted, row: float(numeric(answer, wanted, tolerance=tolerance))
        case "choice":
            return lambda answer, wanted, row: float(choice(answer, wanted))
        case "math_verify":
            return _math_verify()
        case "reasoning_gym":
            return _reasoning_gym()
    if ":" in name:
        return _users(name)
    raise UserError(f"checker: given {name}, wanted one of {', '.join(NAMES)}, or module:function")


# Words of three letters and more, other than functions: a sentence, in which an expression has to be found.
_SENTENCE = re.compile(r"(?<!\\)\b(?!(?:sqrt|sin|cos|tan|log|exp|frac|pi)\b)[^\W\d]{3,}|\$|\\[(\[]|\\boxed")


def _math_verify() -> Checker:
    """Equality of mathematical expressions, by the package math-verify; what it cannot read is compared as text."""
    package = _extra("math_verify", "math-verify")

    def parsed(text: str) -> list[Any]:
        # Of "x + 1" without marks around it the package reads 1 only.
        forms = (text, f"${text}$") if _SENTENCE.search(text) else (f"${text}$", text)
        found: list[Any] = package.parse(forms[0]) or package.parse(forms[1])
        return found

    def check(answer: str, wanted: str, row: Mapping[str, object]) -> float:
        expected, got = parsed(wanted), parsed(answer)
        is_equal = bool(expected and got) and package.verify(expected, got)
        return float(is_equal or exact(answer, wanted))

    return check


def _reasoning_gym() -> Checker:
    """The scorer that belongs to a row's task, by the package reasoning-gym; rows need its column metadata."""
    package = _extra("reasoning_gym", "reasoning-gym")

    def check(answer: str, wanted: str, row: Mapping[str, object]) -> float:
        metadata = row.get("metadata")
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if not isinstance(task, str):
            raise UserError(
                "checker reasoning_gym: given a row without metadata.source_dataset, wanted rows as reasoning-gym "
                "writes them; keep the column metadata, or take another checker"
            )
        entry = {**row, "answer": wanted, "metadata": metadata}
        return float(package.get_score_answer_fn(task)(answer, entry))

    return check


def _extra(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as problem:
        raise EnvironmentFault(
            f"checker {module}: the package {package} is not installed ({problem}); run\n  {install_command('rewards')}"
        ) from problem


def _users(name: str) -> Checker:
    function = own_function(name, "checker")

    def check(answer: str, wanted: str, row: Mapping[str, object]) -> float:
        about = f"the answer {shown(answer)} where {shown(wanted)} is expected"
        returned = function(answer, wanted, dict(row), about=about)
        score = number_of(returned)
        if score is None or not 0 <= score <= 1:
            raise function.error(
                f"returned {shown(returned)}; expected true, false or a number from 0 to 1\n    for {about}"
            )
        return score

    return check
