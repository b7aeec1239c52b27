"""Read prompts, also from preference data, where the prompt may be the common start of two responses.

A prompt is messages for the chat template, or a text without a template. Each prompt is returned once, in order; the
report states read = used + dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from loopos.data.columns import COLUMN, Overrides, column_remedy
from loopos.data.context import CONTEXT_ROLES, with_context
from loopos.data.conversations import ASSISTANT, Message, history_of, message_of, messages_of, with_system
from loopos.data.preference_formats import PreferenceFormat, detect
from loopos.data.reading import DataReport, Unusable, read_examples
from loopos.data.record import kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.template_checks import num_shared
from loopos.data.tool_schemas import Tool, check_no_tools, tools_of

PromptContent: TypeAlias = tuple[Message, ...] | str
"""Messages for the chat template, or a text without a template."""

REPEATED = "same prompt again"
SAME_RESPONSES = "the two responses are the same"
_ASSISTANT_MARK = "Assistant:"
_UP_TO_LAST_BLANK = re.compile(r".*\S(?=\s)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to respond to."""

    prompt: PromptContent
    row: Row
    tools: tuple[Tool, ...] = ()


class WithPrompt(Protocol):
    """An example with a prompt."""

    @property
    def prompt(self) -> PromptContent: ...
    @property
    def row(self) -> Row: ...
    @property
    def tools(self) -> tuple[Tool, ...]: ...


def read_prompts(reader: RowReader, overrides: Overrides, *, as_text: bool = False) -> tuple[list[Prompt], DataReport]:
    """Read a source into prompts, in order; preference rows work too.

    The assistant's last turns of a conversation are removed. Repeated prompts are dropped and counted.

    Args:
        as_text: keep prompts that are strings as text, instead of making a user's message.
    Raises:
        DataError: like `rows.read` and `preference_formats.detect`; bad rows by the reader's policy.
    """

    def from_row(row: Row, form: PreferenceFormat) -> Prompt | Unusable:
        return prompt_of(row, form, as_text=as_text)

    found: tuple[list[Prompt], PreferenceFormat, DataReport]
    found = read_examples(
        reader, lambda columns, source: detect(columns, overrides, source=source, prompts=True), from_row
    )
    examples, _, report = found
    distinct = distinct_prompts(examples)
    repeated = len(examples) - len(distinct)
    dropped = {**report.dropped, REPEATED: repeated} if repeated else report.dropped
    note = untemplated_note([prompt.prompt for prompt in distinct])
    return distinct, replace(report, used=len(distinct), dropped=dropped, notes=(*report.notes, *note))


@dataclass(frozen=True)
class _AnyColumns:
    """The format of rows whose columns an environment names."""

    summary: str
    columns: Mapping[str, str]


def read_tasks(reader: RowReader) -> tuple[list[Prompt], DataReport]:
    """Read a source into the rows that an environment plays, in order, with any columns. Raises `DataError`, as
    `rows.read`.
    """

    def from_row(row: Row, form: _AnyColumns) -> Prompt:
        return Prompt(json.dumps(dict(row.values), sort_keys=True, default=str), row)

    found: tuple[list[Prompt], _AnyColumns, DataReport]
    found = read_examples(reader, lambda columns, source: _AnyColumns(f"columns: {', '.join(columns)}", {}), from_row)
    tasks, _, report = found
    return tasks, report


def distinct_prompts(examples: Iterable[WithPrompt]) -> list[Prompt]:
    """The prompts of comparisons, each once, in order."""
    found: dict[str, Prompt] = {}
    for each in examples:
        found.setdefault(prompt_key(each.prompt, each.tools), Prompt(each.prompt, each.row, each.tools))
    return [*found.values()]


def prompt_of(row: Row, form: PreferenceFormat, *, as_text: bool) -> Prompt | Unusable:
    """The prompt of one row, or the reason why it has none; `as_text` as in `read_prompts`."""
    fields = form.fields(row)
    content, tools = _content_of(fields, form, as_text), tools_of(fields)
    fields.check_no_media()
    if isinstance(content, str):
        check_no_tools(fields, tools)
    if content is None or fields.problems:
        return Unusable(fields.problems[0][0], [diagnostic for _, diagnostic in fields.problems])
    return Prompt(content, row, tools)


def untemplated_note(prompts: Sequence[PromptContent]) -> list[str]:
    """A note on the number of prompts without a chat template; empty if all are rendered."""
    num_texts = sum(isinstance(prompt, str) for prompt in prompts)
    count = "all" if num_texts == len(prompts) else f"{num_texts} of {len(prompts)}"
    return [f"text without a chat template: {count}"] if num_texts else []


def read_prompt(fields: RowFields, *, as_text: bool) -> PromptContent:
    """The prompt from the prompt column of a row; a placeholder if `fields.problems` are filled."""
    value = fields.content("prompt")
    if isinstance(value, dict):
        message = message_of(fields, fields.field("prompt"), value)
        return with_system(fields, [message] if message is not None else [], shown(fields.field("prompt")))
    if isinstance(value, list):
        for role in (*CONTEXT_ROLES, "history"):
            actual = fields.value(role)
            if actual is not None and not (isinstance(actual, str) and not actual.strip()):
                hint = f'write it into the messages, or leave it out: data.columns: {{"{role}": null}}'
                expected = "the whole prompt in the messages"
                fields.add(f"{role} beside messages", fields.field(role), shown(actual), expected, hint)
        return with_system(fields, messages_of(fields, "prompt"), shown(fields.field("prompt")))
    text, history = with_context(fields, "prompt"), history_of(fields)
    if not as_text:
        return with_system(fields, [*history, Message("user", text)], shown(fields.field("prompt")))
    _check_no_system(fields)
    if history:
        hint = "put it into the prompt itself, or use messages"
        actual = f"{len(history) // 2} earlier turns"
        fields.add("history beside text", fields.field("history"), actual, "none with text without a template", hint)
    return text


IMPLICIT: Mapping[str, tuple[str, str]] = {
    "implicit pairs": ("chosen", "rejected"),
    "implicit judged pairs": ("response_1", "response_2"),
}
"""Formats without a prompt → the roles of the responses that start with it."""


def implied(
    fields: RowFields, roles: tuple[str, str] = ("chosen", "rejected")
) -> tuple[PromptContent, tuple[PromptContent, PromptContent]] | None:
    """Prompt and responses of a row whose responses both start with the prompt; None, with problems filled, else."""
    values = {role: fields.content(role) for role in roles}
    if all(isinstance(value, list) for value in values.values()):
        return _implied_messages(fields, roles)
    texts = [fields.text(role) for role, value in values.items() if not isinstance(value, list)]
    check_no_tools(fields, tools_of(fields))
    if fields.problems:
        return None
    if len(texts) < 2:
        actual = " and ".join(f"{kind_name(value)} as {role}" for role, value in values.items())
        expected = "two texts, or two lists of messages"
        fields.add(f"{roles[0]} and {roles[1]} of two kinds", fields.field(roles[1]), actual, expected)
        return None
    _check_no_system(fields)
    one, other = texts
    prompt = shared_text(one, other)
    if is_same(one, other):
        add_identical(fields, fields.field(roles[1]), one)
    elif not prompt.strip():
        _add_unshared(fields, roles[1], f"texts that begin {shown(one, 30)} and {shown(other, 30)}")
    return None if fields.problems else (prompt, (one[len(prompt) :], other[len(prompt) :]))


def shared_text(one: str, other: str) -> str:
    """The common prompt of two texts: up to the last "Assistant:" of their common start, else up to its last
    white space, so that no word is split.
    """
    common = one[: num_shared(one, other)]
    position = common.rfind(_ASSISTANT_MARK)
    if position >= 0:
        return common[: position + len(_ASSISTANT_MARK)]
    content = _UP_TO_LAST_BLANK.match(common)
    return content.group() if content else ""


def check_response(fields: RowFields, messages: Sequence[Message], source: str) -> None:
    """Check that the assistant has the first and last message of a response; other turns may be in between."""
    expected = "the assistant's message first and last, without the prompt"
    if not messages:
        fields.add("response is empty", source, "no message after the prompt", expected)
    elif messages[0].role != ASSISTANT or messages[-1].role != ASSISTANT:
        roles = ", ".join(message.role for message in messages)
        hint = "messages before the response must be in every response, and in the prompt column if there is one"
        fields.add("response is not the assistant's", source, f"messages of {roles}", expected, hint)


def is_answer(response: PromptContent) -> bool:
    """Whether a response is messages that the assistant begins."""
    return bool(response) and not isinstance(response, str) and response[0].role == ASSISTANT


def is_same(one: PromptContent, other: PromptContent) -> bool:
    """Whether two contents are equal apart from outer white space and weights."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one.strip() == other.strip()
    return len(one) == len(other) and all(_is_same_message(*both) for both in zip(one, other, strict=True))


def add_identical(fields: RowFields, source: str, content: PromptContent) -> None:
    """Add the problem of two identical responses."""
    text = content if isinstance(content, str) else content[-1].content
    which = "chosen and rejected" if fields.has("chosen") else "two responses"
    fields.add(SAME_RESPONSES, source, f"{which} are identical ({shown(text)})", "")


def _implied_messages(
    fields: RowFields, roles: tuple[str, str]
) -> tuple[PromptContent, tuple[PromptContent, PromptContent]] | None:
    chosen, rejected = (messages_of(fields, role) for role in roles)
    if fields.problems:
        return None
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    border = next((index for index, both in pairs if not _is_same_message(*both)), shorter)
    if is_same(tuple(chosen), tuple(rejected)):
        add_identical(fields, fields.field(roles[1]), tuple(rejected))
    elif not border:
        begun = " and ".join(shown(messages[0].content, 30) for messages in (chosen, rejected))
        _add_unshared(fields, roles[1], f"messages that begin with {begun}")
    else:
        check_response(fields, chosen[border:], fields.field(roles[0]))
        check_response(fields, rejected[border:], fields.field(roles[1]))
    prompt = with_system(fields, chosen[:border], shown(fields.field(roles[0])))
    return None if fields.problems else (prompt, (tuple(chosen[border:]), tuple(rejected[border:])))


def _content_of(fields: RowFields, form: PreferenceFormat, as_text: bool) -> PromptContent | None:
    if form.kind in IMPLICIT:
        found = implied(fields, IMPLICIT[form.kind])
        return None if found is None else found[0]
    content = read_prompt(fields, as_text=as_text)
    if isinstance(content, str) or fields.problems:
        return content
    last = max((index for index, message in enumerate(content) if message.role != ASSISTANT), default=-1)
    if last < 0:
        expected = "a message that the assistant answers"
        fields.add("no message to answer", fields.field("prompt"), "only assistant messages", expected)
    return content[: last + 1]


def _is_same_message(one: Message, other: Message) -> bool:
    content = one.content.strip() == other.content.strip()
    return content and one.role == other.role and one.more == other.more


def _check_no_system(fields: RowFields) -> None:
    system = fields.optional_text("system")
    if system is not None:
        expected, hint = (
            "no system prompt with text without a template",
            "put it into the prompt itself, or use messages",
        )
        fields.add("system beside text", fields.field("system"), shown(system), expected, hint)


def _add_unshared(fields: RowFields, role: str, actual: str) -> None:
    remedy = column_remedy("name the column of the prompt", ("prompt", COLUMN))
    expected = "responses that start with the same prompt, because there is no prompt column"
    fields.add("no shared prompt", fields.field(role), actual, expected, remedy=remedy)


def prompt_text(prompt: PromptContent) -> str:
    """A prompt as one text: its only message, or all of them with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def prompt_key(prompt: PromptContent, tools: Sequence[Tool] = ()) -> str:
    """A text that is equal only for equal prompts with equal tools."""
    value = prompt if isinstance(prompt, str) else [message.as_template() for message in prompt]
    return json.dumps([value, *tools] if tools else value, sort_keys=True, default=str)
