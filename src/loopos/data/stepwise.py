"""Read answers in steps with a label for each step: what a process reward model learns from.

Columns: prompt, completions (the texts of the steps) and labels, as in TRL's stepwise supervision. A label is true or
false, a probability that the step is right, or null for a step that was not judged. A source without these columns is
read as comparisons (`preferences`). The report states read = used + dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError, Diagnostic
from loopos.config.preferences import STEP_ROLES
from loopos.data.columns import CHOOSE_ONE, COLUMN, Family, Fit, Overrides, Shape, column_remedy, detected
from loopos.data.columns import listed as listed_columns
from loopos.data.conversations import ASSISTANT
from loopos.data.preference_formats import NAMES as PREFERENCE_NAMES
from loopos.data.preference_formats import PreferenceFormat
from loopos.data.preference_formats import detect as detect_comparisons
from loopos.data.preferences import Comparison, comparison_of
from loopos.data.prompts import PromptContent, read_prompt, untemplated_note
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import is_number, kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.tool_schemas import Tool, check_no_tools, tools_of

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "prompt": PREFERENCE_NAMES["prompt"],
    "completions": (frozenset({"completions"}), frozenset({"steps"})),
    "labels": (frozenset({"labels"}), frozenset({"step_labels"})),
    **{role: PREFERENCE_NAMES[role] for role in ("input", "context", "choices", "system", "tools")},
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

_SHAPE: Shape[Literal["steps"]] = Shape(
    "steps", ("prompt", "completions", "labels"), ("input", "context", "choices", "system", "tools")
)
_EXAMPLES = '{"prompt", "completions", "labels"}'
_LABELS = "true or false, a probability from 0 to 1, or null for a step that was not judged"
_SPELLINGS: Mapping[str, float | None] = {"true": 1.0, "false": 0.0, "+": 1.0, "-": 0.0, "": None, "null": None}


@dataclass(frozen=True, slots=True)
class StepwiseFormat:
    """`columns`: role → column."""

    kind: Literal["steps"]
    columns: Mapping[str, str]
    summary: str


@dataclass(frozen=True, slots=True)
class Stepwise:
    """One prompt and an answer in steps. `labels`: of each step, the probability that it is right; None for a step that
    was not judged.
    """

    prompt: PromptContent
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    row: Row
    tools: tuple[Tool, ...] = ()


Judgments: TypeAlias = Comparison | Stepwise
"""What a reward model learns from."""


def read_judgments(
    reader: RowReader, overrides: Overrides, *, as_text: bool = False
) -> tuple[list[Judgments], DataReport]:
    """Reads a source of comparisons, or of answers with step labels, in its order.

    Args:
        overrides: role to column, from `data.columns`.
        as_text: keep texts as text if all are strings, instead of making messages.
    Raises:
        DataError: as `preferences.read_comparisons`.
    """

    def from_row(row: Row, form: PreferenceFormat | StepwiseFormat) -> Judgments | Unusable:
        fields = form.fields(row) if isinstance(form, PreferenceFormat) else RowFields(row, form.columns)
        found: Judgments | None
        if isinstance(form, PreferenceFormat):
            found = comparison_of(fields, form, as_text=as_text)
        else:
            found = stepwise_of(fields, as_text=as_text)
        return Unusable(fields.problems[0][0], [each for _, each in fields.problems]) if found is None else found

    examples: tuple[list[Judgments], PreferenceFormat | StepwiseFormat, DataReport]
    examples = read_examples(reader, lambda columns, source: detect(columns, overrides, source), from_row)
    found, _, report = examples
    report.notes = (*report.notes, *untemplated_note([each.prompt for each in found]))
    return found, report


def detect(columns: Sequence[str], overrides: Overrides, source: str) -> PreferenceFormat | StepwiseFormat:
    """Step labels or comparisons. Raises `DataError`: columns of neither, or of both."""
    steps = detect_steps(columns, overrides, source)
    try:
        compared = detect_comparisons(columns, overrides, source=source)
    except DataError:
        if steps is None:
            raise
        return steps
    if steps is None:
        return compared
    actual = f"columns of 2 formats: {compared.kind} and steps ({listed_columns(columns)})"
    remedy = column_remedy(CHOOSE_ONE, ("labels", steps.columns["labels"]))
    raise DataError([Diagnostic(source, None, None, "data.columns", actual, "one format", "", remedy)])


def detect_steps(columns: Sequence[str], overrides: Overrides, source: str) -> StepwiseFormat | None:
    """The format of rows with step labels; None where the columns are not theirs and no override names their roles.
    Raises `DataError`.
    """
    named = STEP_ROLES & {role for role, column in overrides.items() if column is not None}
    if not set(overrides) <= set(NAMES):
        return None
    try:
        fit = detected(_FAMILY, columns, overrides, source)
    except DataError:
        if named:
            raise
        return None
    return StepwiseFormat(fit.shape.kind, fit.columns, fit.summary)


def stepwise_of(fields: RowFields, *, as_text: bool) -> Stepwise | None:
    """The answer of a row in steps; None, with `fields.problems` filled, if there is none."""
    content = fields.content("prompt")
    prompt = read_prompt(fields, as_text=as_text and isinstance(content, str))
    if not fields.problems and not isinstance(prompt, str) and prompt[-1].role == ASSISTANT:
        hint = "leave the assistant's last message to the completions"
        actual = f"messages of {', '.join(message.role for message in prompt)}"
        fields.add("prompt is already answered", fields.field("prompt"), actual, "a message to answer at the end", hint)
    field = fields.field("completions")
    listed = fields.listed_values("completions", "a list of the texts of the steps")
    steps = tuple(fields.checked("step", f"{field}[{number}]", value) for number, value in enumerate(listed))
    labels = _labels(fields, len(steps))
    fields.check_no_media()
    tools = tools_of(fields)
    if isinstance(prompt, str):
        check_no_tools(fields, tools)
    return None if fields.problems else Stepwise(prompt, steps, labels, fields.row, tools)


def _labels(fields: RowFields, num_steps: int) -> tuple[float | None, ...]:
    """The label of each step."""
    field = fields.field("labels")
    listed = fields.listed_values("labels", "a list with a label for each step")
    labels = tuple(_label(fields, f"{field}[{number}]", value) for number, value in enumerate(listed))
    if fields.problems:
        return ()
    if len(labels) != num_steps:
        actual = f"{len(labels)} {'label' if len(labels) == 1 else 'labels'} for {num_steps} steps"
        fields.add("labels do not fit the steps", field, actual, "a label for each step, null where none was given")
    elif all(label is None for label in labels):
        fields.add("no step is labeled", field, "only null", "a label for one step or more")
    return labels


def _label(fields: RowFields, location: str, value: object) -> float | None:
    """The probability that a step is right; None if it was not judged."""
    if value is None or isinstance(value, bool):
        return None if value is None else float(value)
    if isinstance(value, str) and value.strip().lower() in _SPELLINGS:
        return _SPELLINGS[value.strip().lower()]
    if is_number(value):
        number = float(str(value))
        if math.isfinite(number) and 0 <= number <= 1:
            return number
    hint = "PRM800K rates steps from -1 to 1: write -1 as false, and 0 and 1 as true" if value == -1 else ""
    fields.add("label does not fit", location, f"{shown(value)} ({kind_name(value)})", _LABELS, hint)
    return None


def _rivals(fits: Sequence[Fit[Literal["steps"]]]) -> tuple[str, tuple[str, str]]:
    raise AssertionError("a family of one format")


_FAMILY = Family(NAMES, ((_SHAPE,),), _EXAMPLES, tuple((role, COLUMN) for role in _SHAPE.needed), _rivals)
