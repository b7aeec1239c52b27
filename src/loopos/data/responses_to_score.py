"""Read prompts with responses to score, with or without preferences.

Formats: answers with step labels (`stepwise`); comparisons (`preferences`); rows of a prompt and a response, as `loopos
generate` writes; a prompt with a list of responses; conversations that end with the assistant. Only comparisons have
pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError
from loopos.data.columns import COLUMN, Family, Fit, Shape, detected
from loopos.data.conversations import ASSISTANT, Message, message_of, messages_of, with_system
from loopos.data.preference_formats import NAMES as PREFERENCE_NAMES
from loopos.data.preference_formats import PreferenceFormat
from loopos.data.preference_formats import detect as detect_comparisons
from loopos.data.preferences import Comparison, comparison_of
from loopos.data.prompts import PromptContent, read_prompt
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.stepwise import Judgments, StepwiseFormat, detect_steps, stepwise_of
from loopos.data.stepwise import detect as detect_judgments

Kind: TypeAlias = Literal["conversations", "prompts with a response", "prompts with responses"]

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}), frozenset({"conversations", "conversation"})),
    "prompt": tuple(tier for tier in PREFERENCE_NAMES["prompt"] if "messages" not in tier),
    "response": (
        frozenset({"response"}),
        frozenset({"completion"}),
        frozenset({"text"}),
        frozenset({"output"}),
        frozenset({"answer"}),
    ),
    "responses": (frozenset({"responses"}), frozenset({"completions"})),
    "input": (frozenset({"input"}),),
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape("conversations", ("messages",), ("system",)),
        Shape("prompts with responses", ("prompt", "responses"), ("input", "system")),
    ),
    (Shape("prompts with a response", ("prompt", "response"), ("input", "system")),),
)
_EXAMPLES = (
    '{"prompt", "response"}, {"prompt", "text"} as generate writes them, {"prompt", "responses"}, {"messages"}, '
    'comparisons such as {"prompt", "chosen", "rejected"}, or {"prompt", "completions", "labels"}'
)


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """`columns`: role → column."""

    kind: Kind
    columns: Mapping[str, str]
    summary: str


Form: TypeAlias = PreferenceFormat | ResponseFormat | StepwiseFormat


def read_responses(
    reader: RowReader, overrides: Mapping[str, str], *, as_text: bool = False
) -> tuple[list[Judgments], DataReport]:
    """Reads a whole source of one format, in its order.

    Args:
        overrides: role to column.
        as_text: keep prompt and responses as text if all are strings, instead of making messages.
    Raises:
        DataError: as `preferences.read_comparisons`.
    """

    def from_row(row: Row, form: Form) -> Judgments | Unusable:
        fields = form.fields(row) if isinstance(form, PreferenceFormat) else RowFields(row, form.columns)
        found: Judgments | None
        if isinstance(form, StepwiseFormat):
            found = stepwise_of(fields, as_text=as_text)
        elif isinstance(form, PreferenceFormat):
            found = comparison_of(fields, form, as_text=as_text)
        else:
            found = _answered(fields, form, as_text=as_text)
        return (
            found
            if found is not None
            else Unusable(fields.problems[0][0], [diagnostic for _, diagnostic in fields.problems])
        )

    examples: tuple[list[Judgments], Form, DataReport]
    examples = read_examples(reader, lambda columns, source: detect(columns, overrides, source), from_row)
    return examples[0], examples[2]


def detect(columns: Sequence[str], overrides: Mapping[str, str], source: str) -> Form:
    """Step labels or comparisons where they are, else responses by themselves. Raises `DataError`."""
    if detect_steps(columns, overrides, source) is not None:
        return detect_judgments(columns, overrides, source)
    try:
        return detect_comparisons(columns, overrides, source=source)
    except DataError:
        fit = detected(_FAMILY, columns, overrides, source)
        return ResponseFormat(fit.shape.kind, fit.columns, fit.summary)


def _answered(fields: RowFields, form: ResponseFormat, *, as_text: bool) -> Comparison | None:
    """The responses of a row; None, with `fields.problems` filled, if there is none."""
    if form.kind == "conversations":
        messages = with_system(fields, messages_of(fields, "messages"), shown(fields.field("messages")))
        if not fields.problems and (len(messages) < 2 or messages[-1].role != ASSISTANT):
            roles = ", ".join(message.role for message in messages)
            fields.add("no response", fields.field("messages"), f"messages of {roles}", "a last one of the assistant")
        return None if fields.problems else Comparison(messages[:-1], (messages[-1:],), (), fields.row)
    if form.kind == "prompts with responses":
        values = fields.listed_values("responses", "a list of responses")
        named = [(f"{fields.field('responses')}[{number}]", value) for number, value in enumerate(values)]
    else:
        named = [(fields.field("response"), fields.value("response"))]
    is_text = as_text and all(isinstance(value, str) for value in (fields.value("prompt"), *(v for _, v in named)))
    prompt = read_prompt(fields, as_text=is_text)
    responses = tuple(_response(fields, location, value, as_text=is_text) for location, value in named)
    return None if fields.problems else Comparison(prompt, responses, (), fields.row)


def _response(fields: RowFields, source: str, value: object, *, as_text: bool) -> PromptContent:
    """A text, a message, or a list of them."""
    if isinstance(value, list | dict):
        items = value if isinstance(value, list) else [value]
        read = [message_of(fields, source, item) for item in items]
        return tuple(message for message in read if message is not None)
    text = fields.checked("response", source, value)
    return text if as_text else (Message(ASSISTANT, text),)


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """Names of several formats that fit, and the first column of the first one as the choice."""
    return " and ".join(fit.shape.kind for fit in fits), next(iter(fits[0].columns.items()))


_FAMILY = Family(NAMES, SHAPES, _EXAMPLES, (("prompt", COLUMN), ("response", COLUMN)), _rivals)
