"""Rows for language models: demonstrations, conversations, instructions, completions or plain text.

Column names are those that TRL, LLaMA-Factory and Axolotl read by default, without regard to case; `data.columns`
overrides them. Plain text is the last resort. Two other formats that both fit are an error, because a guess could train
on the wrong one. The report states read = used + dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.data.columns import COLUMN, Family, Fit, Overrides, Shape, detected
from loopos.data.context import CONTEXT_NAMES, CONTEXT_ROLES
from loopos.data.conversations import Conversation, conversation, instruction, prompted
from loopos.data.demonstrations import Demonstration, demonstration
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import kind_name
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.step_format import StepFormat
from loopos.data.tool_schemas import TOOL_NAMES, check_no_tools, tools_of

Kind: TypeAlias = Literal["demonstrations", "conversations", "instructions", "completions", "text"]

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "problem": (
        frozenset({"problem"}),
        frozenset({"question"}),
        frozenset({"prompt"}),
        frozenset({"input", "query"}),
    ),
    "reasoning": (
        frozenset({"reasoning"}),
        frozenset({"steps", "reasoning_steps"}),
        frozenset({"rationale", "chain_of_thought", "cot"}),
        frozenset({"solution"}),
    ),
    "answer": (frozenset({"answer", "final_answer"}),),
    "messages": (frozenset({"messages"}), frozenset({"conversations", "conversation"})),
    "instruction": (frozenset({"instruction"}),),
    **CONTEXT_NAMES,
    "output": (frozenset({"output"}), frozenset({"response"})),
    "history": (frozenset({"history"}),),
    "prompt": (frozenset({"prompt"}),),
    "completion": (frozenset({"completion"}),),
    "text": (frozenset({"text"}),),
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
    "tools": TOOL_NAMES,
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape("conversations", ("messages",), ("system", "tools")),
        Shape(
            "demonstrations",
            ("problem", "answer"),
            ("reasoning", *CONTEXT_ROLES, "system"),
            stand_ins={"answer": "reasoning"},
        ),
        Shape("instructions", ("instruction", "output"), (*CONTEXT_ROLES, "history", "system", "tools")),
        Shape("completions", ("prompt", "completion"), ("tools",)),
    ),
    (Shape("text", ("text",)),),
)
"""The formats in tiers, a better tier winning over a later one."""

_EXAMPLES = (
    '{"problem", "reasoning", "answer"}, {"messages"}, {"conversations"}, {"instruction", "output"}, '
    '{"prompt", "completion"} or {"text"}'
)


@dataclass(frozen=True, slots=True)
class SupervisedFormat:
    """`columns`: role → column. Demonstrations without the role answer keep it behind "####" in their reasoning."""

    kind: Kind
    columns: Mapping[str, str]
    summary: str


def detect(
    columns: Sequence[str],
    overrides: Overrides,
    *,
    remembered: Mapping[str, str | None] | None = None,
    source: str = "data",
) -> SupervisedFormat:
    """Find the format and the column of each of its roles.

    Args:
        columns: names of the existing columns.
        overrides: role to column, from `data.columns`, None for no column; the format then has all these roles.
        remembered: the overrides that the model was trained with, which serve where there are no others and the source
            has all their columns.
        source: the file's name for diagnostics.
    Raises:
        DataError: an override that fits no role or column, no format that fits, or several.
    """
    if remembered and not overrides and all(name is None or name in columns for name in remembered.values()):
        overrides = remembered
    fit = detected(_FAMILY, columns, overrides, source)
    return SupervisedFormat(fit.shape.kind, fit.columns, fit.summary)


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """Names of several formats that fit, and the first column of the first one as the choice."""
    return " and ".join(fit.shape.kind for fit in fits), next(iter(fits[0].columns.items()))


_FAMILY = Family(NAMES, SHAPES, _EXAMPLES, (("problem", COLUMN), ("answer", COLUMN)), _rivals)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, without a chat template."""

    prompt: str
    completion: str
    row: Row


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is trained on as a whole."""

    text: str
    row: Row


Example: TypeAlias = Demonstration | Conversation | Completion | PlainText


def read_supervised(
    reader: RowReader,
    overrides: Overrides,
    *,
    step_format: StepFormat,
    remembered: Mapping[str, str | None] | None = None,
) -> tuple[list[Example], DataReport]:
    """Read a source into examples of one format, in its order. remembered: as `supervised_formats.detect`.

    Raises:
        DataError: as `rows.read` and `supervised_formats.detect`; bad rows by the reader's policy.
    """

    def from_row(row: Row, form: SupervisedFormat) -> Example | Unusable:
        fields = RowFields(row, form.columns)
        example = example_of(fields, form, step_format)
        return example if example is not None else Unusable(fields.problems[0][0], [f for _, f in fields.problems])

    found: tuple[list[Example], SupervisedFormat, DataReport]
    found = read_examples(
        reader, lambda columns, source: detect(columns, overrides, remembered=remembered, source=source), from_row
    )
    return found[0], found[2]


def example_of(fields: RowFields, form: SupervisedFormat, step_format: StepFormat) -> Example | None:
    """The example that a row of this format holds; None, with `fields.problems` filled, if there is none."""
    example: Example | None
    match form.kind:
        case "demonstrations":
            example = demonstration(fields, step_format)
        case "conversations":
            example = conversation(fields)
        case "instructions":
            example = instruction(fields)
        case "completions":
            example = _completion(fields)
        case "text":
            example = PlainText(fields.text("text"), fields.row)
    if form.kind != "text":
        fields.check_no_media()
    return None if fields.problems else example


def _completion(fields: RowFields) -> Completion | Conversation | None:
    """TRL's prompt and completion: two strings, or two lists of messages."""
    prompt, completion = fields.content("prompt"), fields.content("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompted(fields)
    if isinstance(prompt, list) or isinstance(completion, list):
        actual = f"{kind_name(prompt)} as prompt and {kind_name(completion)} as completion"
        expected = "two texts, or two lists of messages"
        fields.add("prompt and completion of two kinds", fields.field("completion"), actual, expected)
        return None
    texts = fields.text("prompt"), fields.text("completion")
    check_no_tools(fields, tools_of(fields))
    return None if fields.problems else Completion(*texts, fields.row)
