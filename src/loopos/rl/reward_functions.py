"""The reward functions that `reward.functions` names; `code_tests` and `judge_endpoint` have two larger ones.

Each is called as `function(prompts, responses, rows, **options)` with three lists of the same length, and returns a
number for each response, or None where it does not judge. `rows` are the rows of data with all their columns. This
module imports nothing heavy, because configs are checked with the signatures.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from loopos.config.diagnostics import MissingRequirement, UserError
from loopos.config.extras import install_command
from loopos.config.sections import StepFormatName
from loopos.data.record import shown
from loopos.data.step_format import NAMED_FORMATS, StepFormat, readings_of_answer
from loopos.evaluation.checkers import checker

Rows: TypeAlias = Sequence[Mapping[str, object]]
_Positive: TypeAlias = Annotated[int, Field(ge=1)]
_NotNegative: TypeAlias = Annotated[int, Field(ge=0)]
_Unit: TypeAlias = Literal["words", "characters"]
_FormatPart: TypeAlias = Literal["opening", "closing", "delimiter", "answer_marker"]
AnswerFormat: TypeAlias = Literal["auto"] | StepFormatName | dict[_FormatPart, str]
"""How a response gives its answer: in a step format, or "auto", in whichever named one it has."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward function may return instead of a list: `values`, and under each name of `fractions` whether it
    holds of a response. Metrics have the fraction of the responses of which it does.
    """

    values: Sequence[float | None]
    fractions: Mapping[str, Sequence[bool]] = field(default_factory=dict)


class NotOfARow(UserError):
    """An error that no single row causes, such as an endpoint that does not answer."""


def column_of(name: str, row: Mapping[str, object], *columns: str) -> object:
    """The value of the first of these columns, in any case of letters, that a row has. name: of the reward. Raises
    `UserError`.
    """
    lowered = {each.lower(): each for each in row}
    found = next((lowered[each.lower()] for each in columns if each.lower() in lowered), None)
    if found is None:
        expected, known = " or ".join(f'"{each}"' for each in columns), ", ".join(row) or "none"
        raise UserError(f"reward function {name}: got a row without a column {expected} (columns: {known})")
    return row[found]


def _answers_checked(
    name: str, responses: Sequence[str], rows: Rows, step_format: AnswerFormat, *, tolerance: float = 1e-6
) -> list[float]:
    """The verdict of a checker on the answer that each response gives, against the column `answer` of its row; the best
    of its readings. No answer scores 0.
    """
    check, form = checker(name, tolerance=tolerance), None if step_format == "auto" else _form(step_format)
    found = []
    for response, row in zip(responses, rows, strict=True):
        expected = str(column_of(name, row, "answer"))
        readings = readings_of_answer(response) if form is None else (form.parse(response).answer,)
        found.append(max((check(answer, expected, row) for answer in readings if answer.strip()), default=0.0))
    return found


def _form(step_format: StepFormatName | dict[_FormatPart, str]) -> StepFormat:
    return NAMED_FORMATS[step_format] if isinstance(step_format, str) else StepFormat(**step_format)


def automatic_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Rows,
    *,
    tolerance: float = 1e-6,
    step_format: AnswerFormat = "auto",
) -> list[float]:
    """1 where the response is the row's answer, compared as a number, as a letter or as text by what the answer is."""
    return _answers_checked("auto", responses, rows, step_format, tolerance=tolerance)


def exact_answer(
    prompts: Sequence[str], responses: Sequence[str], rows: Rows, *, step_format: AnswerFormat = "auto"
) -> list[float]:
    """1 where the response is the row's answer as text, without regard to case, spaces and quotes."""
    return _answers_checked("exact", responses, rows, step_format)


def numeric_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Rows,
    *,
    tolerance: float = 1e-6,
    step_format: AnswerFormat = "auto",
) -> list[float]:
    """1 where the response states the number of the row's answer, within a relative error of `tolerance`."""
    return _answers_checked("numeric", responses, rows, step_format, tolerance=tolerance)


def choice_answer(
    prompts: Sequence[str], responses: Sequence[str], rows: Rows, *, step_format: AnswerFormat = "auto"
) -> list[float]:
    """1 where the response chooses the letter of the row's answer."""
    return _answers_checked("choice", responses, rows, step_format)


def math_answer(
    prompts: Sequence[str], responses: Sequence[str], rows: Rows, *, step_format: AnswerFormat = "auto"
) -> list[float]:
    """1 where the response equals the row's answer as mathematics (package math-verify, extra rewards)."""
    return _answers_checked("math_verify", responses, rows, step_format)


def reasoning_gym_answer(
    prompts: Sequence[str], responses: Sequence[str], rows: Rows, *, step_format: AnswerFormat = "auto"
) -> list[float]:
    """The score of reasoning-gym's own scorer of the row's task, from 0 to 1 (package reasoning-gym, extra rewards)."""
    return _answers_checked("reasoning_gym", responses, rows, step_format)


def regular_expression(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Rows = (),
    *,
    pattern: str | None = None,
    column: str = "pattern",
    whole: bool = False,
) -> list[float]:
    """1 where a regular expression of Python finds something in the response, or with `whole` matches all of it.

    pattern: the expression; without it each row has its own in `column`. Flags stand in it: `(?is)`.
    """
    found = []
    for index, response in enumerate(responses):
        expression = pattern if pattern is not None else str(column_of("regex", rows[index], column))
        try:
            compiled = re.compile(expression)
        except re.error as problem:
            raise UserError(f"reward function regex: the pattern {shown(expression)}: {problem}") from problem
        match = compiled.fullmatch(response) if whole else compiled.search(response)
        found.append(float(match is not None))
    return found


_FENCED = re.compile(r"```[ \t]*(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def json_schema(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Rows = (),
    *,
    schema: dict[str, Any] | None = None,
    column: str = "schema",
    parsed: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> list[float]:
    """1 where the response is JSON that its schema allows (package jsonschema, extra rewards).

    The response is JSON as a whole, or has one block fenced by ```` ```json ````. schema: of all rows; without it each
    row has its own in `column`, as JSON or as text. parsed: the score of JSON that the schema does not allow.
    """
    found = []
    for index, response in enumerate(responses):
        allowed = schema if schema is not None else column_of("json_schema", rows[index], column)
        validator = _validator(allowed if isinstance(allowed, str) else json.dumps(allowed))
        blocks = _FENCED.findall(response)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else response)
        except (ValueError, RecursionError):
            found.append(0.0)
            continue
        found.append(1.0 if validator(value) else parsed)
    return found


@cache
def _validator(text: str) -> Callable[[object], bool]:
    """Whether a value is allowed by a schema. References to other documents are not fetched. Raises `UserError`."""
    try:
        jsonschema = import_module("jsonschema")
        registry = import_module("referencing.jsonschema").EMPTY_REGISTRY
    except ModuleNotFoundError as problem:
        raise MissingRequirement(
            f"reward function json_schema: the package jsonschema is not installed ({problem}); run\n"
            f"  {install_command('rewards')}"
        ) from problem
    try:
        schema = json.loads(text)
        validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        validator_class.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as problem:
        reason = getattr(problem, "message", problem)
        raise UserError(f"reward function json_schema: the schema {shown(text)} is none: {reason}") from problem
    validator = validator_class(schema, registry=registry)

    def allows(value: object) -> bool:
        try:
            return bool(validator.is_valid(value))
        except import_module("referencing.exceptions").Unresolvable as problem:
            raise UserError(f"reward function json_schema: {shown(text)}: no such reference: {problem}") from problem

    return allows


def steps_format(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    step_format: StepFormatName | dict[_FormatPart, str] = "think",
    min_steps: _NotNegative = 1,
    max_steps: _Positive | None = None,
) -> list[float]:
    """1 where the response is steps and an answer in the step format, with nothing behind them.

    step_format: think, hashes, lines or the four strings, as in `data.step_format` of chain_of_thought. min_steps,
    max_steps: the number of steps.
    """
    form = _form(step_format)
    found = []
    for response in responses:
        read = form.parse(response)
        fits = min_steps <= len(read.steps) and (max_steps is None or len(read.steps) <= max_steps)
        found.append(float(read.well_formed and fits))
    return found


def length_window(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    num_tokens: Sequence[int],
    minimum: _NotNegative = 0,
    maximum: _Positive | None = None,
    soft: _NotNegative = 0,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> list[float]:
    """0 for a length from `minimum` to `maximum`; at a distance of d outside −min(1, d / `soft`), or −1.

    It is the soft overlong punishment of DAPO (Yu et al. 2025, equation 13) with its interval as `soft`, and as
    `maximum` its longest length less the interval.
    """
    lengths = num_tokens if unit == "tokens" else [len(_units(each, unit)) for each in responses]
    found = []
    for length in lengths:
        distance = max(minimum - length, 0 if maximum is None else length - maximum, 0)
        found.append(-min(1.0, distance / max(soft, 1)))
    return found


def repetition(
    prompts: Sequence[str], responses: Sequence[str], *, n: _Positive = 4, unit: _Unit = "words"
) -> list[float]:
    """Minus the fraction of n-grams that occurred before in the response, from −1 to 0; 0 for a shorter response."""
    found = []
    for response in responses:
        units = _units(response, unit)
        grams = [tuple(units[first : first + n]) for first in range(len(units) - n + 1)]
        found.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return found


def language(
    prompts: Sequence[str], responses: Sequence[str], *, scripts: Annotated[list[str], Field(min_length=1)]
) -> list[float | None]:
    """The fraction of the response's letters that are of these scripts; None for a response without letters.

    scripts: first words of the letters' Unicode names, such as latin, cyrillic, greek, arabic, hebrew, devanagari, cjk
    (Chinese characters), hiragana, katakana, hangul, thai. It does not tell apart languages of one script.
    """
    expected = {script.upper() for script in scripts}
    found: list[float | None] = []
    for response in responses:
        letters = [unicodedata.name(each, "").split(" ")[0] for each in response if each.isalpha()]
        found.append(sum(each in expected for each in letters) / len(letters) if letters else None)
    return found


def _units(text: str, unit: str) -> Sequence[str]:
    return text if unit == "characters" else text.split()
