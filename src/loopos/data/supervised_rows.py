"""Rows → examples that a language model learns from, whatever their format.

Enters: the rows of a reader, the user's choice of columns, the `StepFormat` of the run. Leaves: examples in the rows'
order and a `FormatReport` in which read = used + dropped. Left out: templates and tokens (`templates`,
`supervised_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from loopos.data.conversations import Conversation, conversation, instruction, prompted
from loopos.data.demonstrations import Demonstration, demonstration
from loopos.data.format_detection import Overrides
from loopos.data.reading import FormatReport, Unusable, read_examples
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.step_format import StepFormat
from loopos.data.supervised_formats import SupervisedFormat, detect
from loopos.data.tool_schemas import check_no_tools, tools_of
from loopos.data.values import kind_name


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, both as they stand: no chat template touches them."""

    prompt: str
    completion: str
    row: Row


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is learned whole."""

    text: str
    row: Row


Example: TypeAlias = Demonstration | Conversation | Completion | PlainText


def read_supervised(
    reader: RowReader,
    overrides: Overrides,
    *,
    step_format: StepFormat,
    remembered: Mapping[str, str | None] | None = None,
) -> tuple[list[Example], FormatReport]:
    """Reads a whole source into examples of one format, in its order. remembered: as `supervised_formats.detect`.

    Raises:
        DataError: as `rows.read` and `supervised_formats.detect`; bad rows by the reader's policy, the file's and the
        format's together.
    """

    def from_row(row: Row, form: SupervisedFormat) -> Example | Unusable:
        fields = RowFields(row, form.columns)
        example = example_of(fields, form, step_format)
        return example if example is not None else Unusable(fields.problems[0][0], [f for _, f in fields.problems])

    found: tuple[list[Example], SupervisedFormat, FormatReport]
    found = read_examples(
        reader, lambda columns, source: detect(columns, overrides, remembered=remembered, source=source), from_row
    )
    return found[0], found[2]


def example_of(fields: RowFields, form: SupervisedFormat, step_format: StepFormat) -> Example | None:
    """The example that a row of this format holds; None, with `fields.problems` filled, where it holds none."""
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
    prompt, completion = fields.spoken("prompt"), fields.spoken("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompted(fields)
    if isinstance(prompt, list) or isinstance(completion, list):
        given = f"{kind_name(prompt)} as prompt and {kind_name(completion)} as completion"
        wanted = "two texts, or two lists of messages"
        fields.add("prompt and completion of two kinds", fields.field("completion"), given, wanted)
        return None
    texts = fields.text("prompt"), fields.text("completion")
    check_no_tools(fields, tools_of(fields))
    return None if fields.problems else Completion(*texts, fields.row)
