"""Read single answers with a thumb, up or down: what KTO learns from.

Formats: prompt, completion and label; a conversation that ends with the assistant, and a label; or comparisons
(`preferences`), each of whose responses becomes an answer of its own: up where it is preferred, down where another is.
The report states read = used + dropped, in rows of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loopos.config.diagnostics import DataError
from loopos.data.annotation_exports import submitted
from loopos.data.columns import COLUMN, Family, Fit, Overrides, Shape, detected
from loopos.data.context import CONTEXT_NAMES, CONTEXT_ROLES
from loopos.data.conversations import ASSISTANT, HISTORY_NAMES, Message, message_of, messages_of, with_system
from loopos.data.preference_formats import NAMES as PREFERENCE_NAMES
from loopos.data.preference_formats import PreferenceFormat
from loopos.data.preference_formats import detect as detect_comparisons
from loopos.data.preferences import Comparison, comparison_of
from loopos.data.prompts import PromptContent, check_response, read_prompt
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import is_number, kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.tool_schemas import TOOL_NAMES, tools_of

Kind: TypeAlias = Literal["conversations with a thumb", "answers with a thumb"]

NAMES: Mapping[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}), frozenset({"conversations", "conversation"})),
    "prompt": tuple(tier for tier in PREFERENCE_NAMES["prompt"] if "messages" not in tier),
    "completion": (frozenset({"completion"}), frozenset({"response"}), frozenset({"output"}), frozenset({"answer"})),
    "label": (
        frozenset({"label"}),
        frozenset({"kto_tag"}),
        frozenset({"label.responses"}),
        frozenset({"label.suggestion"}),
        frozenset({"thumb", "thumbs", "thumbs_up", "desirable", "is_desirable", "feedback"}),
    ),
    **CONTEXT_NAMES,
    "history": HISTORY_NAMES,
    "system": (frozenset({"system"}), frozenset({"system_prompt"})),
    "tools": TOOL_NAMES,
}
"""The names of each role's column in tiers, a better tier winning over a later one."""

SHAPES: tuple[tuple[Shape[Kind], ...], ...] = (
    (
        Shape(
            "answers with a thumb",
            ("prompt", "completion", "label"),
            (*CONTEXT_ROLES, "history", "system", "tools"),
        ),
    ),
    (Shape("conversations with a thumb", ("messages", "label"), ("system", "tools")),),
)
_EXAMPLES = (
    '{"prompt", "completion", "label"}, {"messages", "label"}, or comparisons as {"prompt", "chosen", "rejected"}'
)

_UP = frozenset({"true", "1", "yes", "up", "good", "desirable", "chosen", "thumbs_up", "thumbsup", "like", "👍"})
_DOWN = frozenset(
    {"false", "0", "no", "down", "bad", "undesirable", "rejected", "thumbs_down", "thumbsdown", "dislike", "-1", "👎"}
)
_EXPECTED = "true or false, 1 or 0, up or down, good or bad, desirable or undesirable"


@dataclass(frozen=True, slots=True)
class ThumbFormat:
    """`columns`: role → column."""

    kind: Kind
    columns: Mapping[str, str]
    summary: str


@dataclass(frozen=True, slots=True)
class Thumbs:
    """One prompt with answers, each judged by itself. `desirable`: of each response of `comparison`, whose pairs are
    not used.
    """

    comparison: Comparison
    desirable: tuple[bool, ...]

    @property
    def row(self) -> Row:
        return self.comparison.row

    @property
    def prompt(self) -> PromptContent:
        return self.comparison.prompt


def read_thumbs(reader: RowReader, overrides: Overrides, *, as_text: bool = False) -> tuple[list[Thumbs], DataReport]:
    """Reads a source of one format, in its order.

    Args:
        overrides: role to column, from `data.columns`.
        as_text: keep prompt and answers as text if all are strings, instead of making messages.
    Raises:
        DataError: as `preferences.read_comparisons`.
    """

    def from_row(row: Row, form: PreferenceFormat | ThumbFormat) -> Thumbs | Unusable:
        fields = form.fields(row) if isinstance(form, PreferenceFormat) else RowFields(row, form.columns)
        if isinstance(form, PreferenceFormat):
            comparison = comparison_of(fields, form, as_text=as_text)
            found = None if comparison is None else Thumbs(comparison, thumbs_of(comparison))
        else:
            found = _answer(fields, form, as_text=as_text)
        return Unusable(fields.problems[0][0], [each for _, each in fields.problems]) if found is None else found

    examples: tuple[list[Thumbs], PreferenceFormat | ThumbFormat, DataReport]
    examples = read_examples(reader, lambda columns, source: detect(columns, overrides, source), from_row)
    return examples[0], examples[2]


def detect(columns: Sequence[str], overrides: Overrides, source: str) -> PreferenceFormat | ThumbFormat:
    """Answers with a thumb where there is one, else comparisons. Raises `DataError` that names both."""
    try:
        return detect_comparisons(columns, overrides, source=source)
    except DataError:
        fit = detected(_FAMILY, columns, overrides, source)
        return ThumbFormat(fit.shape.kind, fit.columns, fit.summary)


def thumbs_of(comparison: Comparison) -> tuple[bool, ...]:
    """Up for a response that wins more of its pairs than it loses, weighted by their probabilities."""
    balance = [0.0] * len(comparison.responses)
    for pair in comparison.pairs:
        balance[pair.better] += 2 * pair.probability - 1
        balance[pair.worse] -= 2 * pair.probability - 1
    return tuple(value > 0 for value in balance)


def _answer(fields: RowFields, form: ThumbFormat, *, as_text: bool) -> Thumbs | None:
    """The judged answer of a row; None, with `fields.problems` filled, if there is none."""
    prompt: PromptContent
    response: PromptContent
    if form.kind == "conversations with a thumb":
        messages = with_system(fields, messages_of(fields, "messages"), shown(fields.field("messages")))
        if not fields.problems and (len(messages) < 2 or messages[-1].role != ASSISTANT):
            roles = ", ".join(message.role for message in messages)
            fields.add("no answer", fields.field("messages"), f"messages of {roles}", "a last one of the assistant")
        prompt, response = messages[:-1], messages[-1:]
    else:
        value = fields.content("completion")
        is_text = as_text and isinstance(value, str) and isinstance(fields.content("prompt"), str)
        prompt = read_prompt(fields, as_text=is_text)
        response = _response(fields, value, as_text=is_text)
        if not fields.problems and not isinstance(response, str):
            check_response(fields, response, fields.field("completion"))
    desirable, tools = _thumb(fields), tools_of(fields)
    if fields.problems:
        return None
    return Thumbs(Comparison(prompt, (response,), (), fields.row, tools), (desirable,))


def _response(fields: RowFields, value: object, *, as_text: bool) -> PromptContent:
    field = fields.field("completion")
    if isinstance(value, list | dict):
        items = value if isinstance(value, list) else [value]
        read = [message_of(fields, f"{field}[{number}]", item) for number, item in enumerate(items)]
        return tuple(message for message in read if message is not None)
    text = fields.checked("completion", field, value)
    return text if as_text else (Message(ASSISTANT, text),)


def is_thumb(value: object) -> bool:
    """Whether a value is a thumb, or what several people said."""
    votes = submitted(value) if isinstance(value, list) else [value]
    return bool(votes) and all(_is_up(vote) is not None for vote in votes)


def _thumb(fields: RowFields) -> bool:
    """Whether the answer is desirable: one thumb, or what most of several people say."""
    value = fields.structure("label")
    votes = [_is_up(vote) for vote in submitted(value)] if isinstance(value, list) else [_is_up(value)]
    actual = f"{shown(value)} ({kind_name(value)})"
    ups, downs = votes.count(True), votes.count(False)
    if not votes or None in votes:
        fields.add("label does not fit", fields.field("label"), actual, _EXPECTED)
    elif ups == downs:
        fields.add("as many up as down", fields.field("label"), actual, "more of one than of the other")
    return ups > downs


def _is_up(vote: object) -> bool | None:
    """One thumb, by itself or as Argilla's `value`; None for anything else."""
    value = vote.get("value") if isinstance(vote, dict) else vote
    if isinstance(value, bool):
        return value
    spelling = f"{value:g}" if is_number(value) and not isinstance(value, str) else str(value).strip().lower()
    return spelling in _UP if spelling in _UP or spelling in _DOWN else None


def _rivals(fits: Sequence[Fit[Kind]]) -> tuple[str, tuple[str, str]]:
    """Names of several formats that fit, and the first column of the first one as the choice."""
    return " and ".join(fit.shape.kind for fit in fits), next(iter(fits[0].columns.items()))


_FAMILY = Family(NAMES, SHAPES, _EXAMPLES, (("prompt", COLUMN), ("completion", COLUMN), ("label", COLUMN)), _rivals)
