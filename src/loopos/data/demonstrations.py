"""Read demonstrations: a problem, the steps that solve it, and the answer.

Reasoning is a list of steps, or one text that is split at the format's delimiter (else at line ends). The answer may
follow `####` at the end of the solution, as in GSM8K (Cobbe et al. 2021). Outer white space is removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loopos.data.columns import COLUMN, column_remedy
from loopos.data.context import chosen_letter, with_context
from loopos.data.record import kind_name, shown, structure_of, unicode_problem
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row
from loopos.data.step_format import StepFormat

HASHES = "####"
_REASONING_EXPECTED = "a list of steps, or one text with a step a line"
_ANSWER_EXPECTED = "a text or a number"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One worked example (Wei et al. 2022): `steps` may be empty, then only the answer is trained."""

    problem: str
    steps: tuple[str, ...]
    answer: str
    row: Row
    system: str | None = None


def demonstration(fields: RowFields, step_format: StepFormat) -> Demonstration | None:
    """The demonstration that a row holds; None, with `fields.problems` filled, if there is none."""
    problem, system = with_context(fields, "problem"), fields.optional_text("system")
    steps, answer = _chain(fields, step_format.delimiter)
    answer = chosen_letter(fields, answer)
    if not fields.problems:
        reason = step_format.problem(steps, answer)
        if reason is not None:
            role = "reasoning" if reason.startswith("step ") and fields.has("reasoning") else "answer"
            hint = "write one step an entry, or choose another data.step_format (chain_of_thought)"
            expected = "steps and an answer that the step format can hold"
            fields.add("reasoning does not fit the step format", fields.field(role), reason, expected, hint)
    if fields.problems:
        return None
    return Demonstration(problem.strip(), steps, answer, fields.row, system)


def expected_answer(fields: RowFields) -> str | None:
    """The answer of a problem, whatever its steps; None, perhaps with `fields.problems` filled, if there is none."""
    answer = chosen_letter(fields, _chain(fields, "\n")[1])
    return None if fields.problems or not answer else answer


def _chain(fields: RowFields, delimiter: str) -> tuple[tuple[str, ...], str]:
    """Steps and answer, as far as they can be read."""
    if not fields.has("answer"):
        return _solution(fields, delimiter)
    answer = _answer(fields)
    before, hashes, after = answer.rpartition(HASHES)
    if not fields.has("reasoning"):
        return (_split(before, delimiter), after.strip()) if hashes else ((), answer)
    if hashes and before.strip():
        actual = f"{shown(answer)}, with reasoning before {HASHES}, beside {shown(fields.field('reasoning'))}"
        fields.add("answer holds reasoning", fields.field("answer"), actual, "the reasoning in only one of them")
    return _steps(fields, delimiter), after.strip() if hashes else answer


def _solution(fields: RowFields, delimiter: str) -> tuple[tuple[str, ...], str]:
    """Steps and answer of a worked solution that ends with "#### answer"."""
    steps = _steps(fields, delimiter)
    if fields.problems:
        return (), ""
    _, hashes, answer = "\n".join(steps).rpartition(HASHES)
    if not hashes or not answer.strip() or "\n" in answer:
        actual = f"a solution that ends in {shown(steps[-1] if steps else '')}, and no answer column"
        remedy = column_remedy("or name its column", ("answer", COLUMN))
        fields.add(
            "answer is missing", fields.field("reasoning"), actual, f"{HASHES} answer in the last line", "", remedy
        )
        return (), ""
    before_last = list(steps[:-1])
    last = steps[-1].rpartition(HASHES)[0].strip()
    return tuple([*before_last, last] if last else before_last), answer.strip()


def _answer(fields: RowFields) -> str:
    """The answer as text: a number is written as JSON writes it."""
    value = fields.value("answer")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, bool | float | list | dict):
        actual = f"{shown(value)} ({kind_name(value)})"
        fields.add("answer is not a text", fields.field("answer"), actual, _ANSWER_EXPECTED)
        return ""
    return fields.text("answer").strip()


def _steps(fields: RowFields, delimiter: str) -> tuple[str, ...]:
    """The steps of the reasoning column; an empty list means an answer without reasoning."""
    value, field = fields.value("reasoning"), fields.field("reasoning")
    if isinstance(value, str):
        # CSV keeps a list of steps as its text.
        listed = structure_of(value)
        value = listed if isinstance(listed, list) and all(isinstance(step, str) for step in listed) else value
    if value == []:
        return ()
    if isinstance(value, list):
        steps = [fields.checked("reasoning step", f"{field}[{index}]", step) for index, step in enumerate(value)]
        return tuple(step.strip() for step in steps)
    if isinstance(value, str) and value.strip():
        problem = unicode_problem(value)
        if problem is not None:
            fields.add(f"reasoning {problem[0]}", field, problem[1], _REASONING_EXPECTED, problem[2])
        return _split(value, delimiter)
    if value is None or isinstance(value, str):
        hint = "an empty list means an answer without reasoning"
        actual = "null" if value is None else shown(value)
        fields.add("reasoning is blank", field, actual, _REASONING_EXPECTED, hint)
    else:
        actual = f"{shown(value)} ({kind_name(value)})"
        fields.add("reasoning is not a text", field, actual, _REASONING_EXPECTED)
    return ()


def _split(text: str, delimiter: str) -> tuple[str, ...]:
    parts = text.split(delimiter) if delimiter in text else text.split("\n")
    return tuple(part.strip() for part in parts if part.strip())
