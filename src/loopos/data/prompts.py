"""Rows → prompts: what is asked, in preference data too, where the prompt may be what two responses begin with.

Enters: the rows of a reader, the user's choice of columns. Leaves: `Prompt`s in the rows' order, each once, and a
`FormatReport` in which read = used + dropped. A prompt is messages for the chat template, or a text that stands as it
is. Left out: responses and which is better (`preferences`), tokens (`preference_tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from loopos.data.columns import COLUMN, Overrides, column_remedy
from loopos.data.context import CONTEXT_ROLES, with_context
from loopos.data.conversations import ASSISTANT, Message, message_of, messages_of, with_system
from loopos.data.preference_formats import PreferenceFormat, detect
from loopos.data.reading import FormatReport, Unusable, read_examples
from loopos.data.record import kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row, RowReader
from loopos.data.template_checks import num_shared
from loopos.data.tool_schemas import Tool, check_no_tools, tools_of

Words: TypeAlias = tuple[Message, ...] | str
"""Messages for the chat template, or a text that no template touches."""

REPEATED = "same prompt again"
SAME_RESPONSES = "the two responses are the same"
_ASSISTANT_MARK = "Assistant:"
_UP_TO_LAST_BLANK = re.compile(r".*\S(?=\s)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a response is to be written to."""

    prompt: Words
    row: Row
    tools: tuple[Tool, ...] = ()


def read_prompts(
    reader: RowReader, overrides: Overrides, *, as_text: bool = False
) -> tuple[list[Prompt], FormatReport]:
    """Reads a whole source into prompts, in its order; those of preference rows too. Of a conversation the assistant's
    last words are left off. A prompt that came before is dropped and counted.

    Args:
        as_text: prompts that are strings stand as they are, instead of being a user's message.
    Raises:
        DataError: as `rows.read` and `preference_formats.detect`; bad rows by the reader's policy.
    """

    def from_row(row: Row, form: PreferenceFormat) -> Prompt | Unusable:
        return prompt_of(row, form, as_text=as_text)

    found: tuple[list[Prompt], PreferenceFormat, FormatReport]
    found = read_examples(
        reader, lambda columns, source: detect(columns, overrides, source=source, prompts=True), from_row
    )
    examples, _, report = found
    kept: dict[str, Prompt] = {}
    for prompt in examples:
        kept.setdefault(prompt_key(prompt.prompt, prompt.tools), prompt)
    repeated = len(examples) - len(kept)
    dropped = {**report.dropped, REPEATED: repeated} if repeated else report.dropped
    told = stands_as_is([prompt.prompt for prompt in kept.values()])
    return list(kept.values()), replace(report, used=len(kept), dropped=dropped, summary=(*report.summary, *told))


def prompt_of(row: Row, form: PreferenceFormat, *, as_text: bool) -> Prompt | Unusable:
    """The prompt of one row, or why it has none; `as_text` as for `read_prompts`."""
    fields = RowFields(row, form.columns)
    words, tools = _words_of(fields, form, as_text), tools_of(fields)
    fields.check_no_media()
    if isinstance(words, str):
        check_no_tools(fields, tools)
    if words is None or fields.problems:
        return Unusable(fields.problems[0][0], [diagnostic for _, diagnostic in fields.problems])
    return Prompt(words, row, tools)


def stands_as_is(prompts: Sequence[Words]) -> list[str]:
    """The sentence that says how many prompts no chat template touches; none where it renders all of them."""
    num_texts = sum(isinstance(prompt, str) for prompt in prompts)
    share = "all" if num_texts == len(prompts) else f"{num_texts} of {len(prompts)}"
    return [f"text as it stands, without a chat template: {share}"] if num_texts else []


def asked(fields: RowFields, *, as_text: bool) -> Words:
    """The prompt of a row that has a column for it; an empty stand-in where `fields.problems` say why there is none."""
    value = fields.spoken("prompt")
    if isinstance(value, dict):
        message = message_of(fields, fields.field("prompt"), value)
        return with_system(fields, [message] if message is not None else [], shown(fields.field("prompt")))
    if isinstance(value, list):
        for role in CONTEXT_ROLES:
            actual = fields.value(role)
            if actual is not None and not (isinstance(actual, str) and not actual.strip()):
                hint = f'write it into the messages, or leave it out: data.columns: {{"{role}": null}}'
                expected = "all that is asked in the messages"
                fields.add(f"{role} beside messages", fields.field(role), shown(actual), expected, hint)
        return with_system(fields, messages_of(fields, "prompt"), shown(fields.field("prompt")))
    text = with_context(fields, "prompt")
    if not as_text:
        return with_system(fields, [Message("user", text)], shown(fields.field("prompt")))
    _check_no_system(fields)
    return text


def implied(fields: RowFields) -> tuple[Words, tuple[Words, Words]] | None:
    """Prompt and responses of a row whose two responses begin with the prompt; None, with problems filled, else."""
    values = {role: fields.spoken(role) for role in ("chosen", "rejected")}
    if all(isinstance(value, list) for value in values.values()):
        return _implied_messages(fields)
    texts = [fields.text(role) for role, value in values.items() if not isinstance(value, list)]
    check_no_tools(fields, tools_of(fields))
    if fields.problems:
        return None
    if len(texts) < 2:
        actual = f"{kind_name(values['chosen'])} as chosen and {kind_name(values['rejected'])} as rejected"
        expected = "two texts, or two lists of messages"
        fields.add("chosen and rejected of two kinds", fields.field("rejected"), actual, expected)
        return None
    _check_no_system(fields)
    one, other = texts
    prompt = shared_text(one, other)
    if is_same(one, other):
        add_same(fields, fields.field("rejected"), one)
    elif not prompt.strip():
        _add_unshared(fields, f"texts that begin {shown(one, 30)} and {shown(other, 30)}")
    return None if fields.problems else (prompt, (one[len(prompt) :], other[len(prompt) :]))


def shared_text(one: str, other: str) -> str:
    """The prompt that two texts share: up to the last "Assistant:" of their common beginning, else up to its last white
    space, so that no word is split.
    """
    common = one[: num_shared(one, other)]
    position = common.rfind(_ASSISTANT_MARK)
    if position >= 0:
        return common[: position + len(_ASSISTANT_MARK)]
    words = _UP_TO_LAST_BLANK.match(common)
    return words.group() if words else ""


def check_spoken(fields: RowFields, messages: Sequence[Message], source: str) -> None:
    """Notes a response that the assistant does not begin and end; other turns may stand between."""
    expected = "the assistant's message first and last, without the prompt"
    if not messages:
        fields.add("response is empty", source, "no message behind the prompt", expected)
    elif messages[0].role != ASSISTANT or messages[-1].role != ASSISTANT:
        roles = ", ".join(message.role for message in messages)
        hint = "what stands before the response must be in every response, and in the prompt column if there is one"
        fields.add("response is not the assistant's", source, f"messages of {roles}", expected, hint)


def is_same(one: Words, other: Words) -> bool:
    """Whether two pieces say the same, white space at their ends and weights aside."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one.strip() == other.strip()
    return len(one) == len(other) and all(_is_same_message(*both) for both in zip(one, other, strict=True))


def add_same(fields: RowFields, source: str, words: Words) -> None:
    """Notes that a response says what another does."""
    text = words if isinstance(words, str) else words[-1].content
    which = "two responses" if fields.has("responses") else "chosen and rejected"
    fields.add(SAME_RESPONSES, source, f"{which} are identical ({shown(text)})", "")


def _implied_messages(fields: RowFields) -> tuple[Words, tuple[Words, Words]] | None:
    chosen, rejected = messages_of(fields, "chosen"), messages_of(fields, "rejected")
    if fields.problems:
        return None
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    border = next((place for place, both in pairs if not _is_same_message(*both)), shorter)
    if is_same(tuple(chosen), tuple(rejected)):
        add_same(fields, fields.field("rejected"), tuple(rejected))
    elif not border:
        begun = " and ".join(shown(messages[0].content, 30) for messages in (chosen, rejected))
        _add_unshared(fields, f"messages that begin with {begun}")
    else:
        check_spoken(fields, chosen[border:], fields.field("chosen"))
        check_spoken(fields, rejected[border:], fields.field("rejected"))
    prompt = with_system(fields, chosen[:border], shown(fields.field("chosen")))
    return None if fields.problems else (prompt, (tuple(chosen[border:]), tuple(rejected[border:])))


def _words_of(fields: RowFields, form: PreferenceFormat, as_text: bool) -> Words | None:
    if form.kind == "implicit pairs":
        found = implied(fields)
        return None if found is None else found[0]
    words = asked(fields, as_text=as_text)
    if isinstance(words, str) or fields.problems:
        return words
    last = max((index for index, message in enumerate(words) if message.role != ASSISTANT), default=-1)
    if last < 0:
        expected = "a message that the assistant answers"
        fields.add("no message to answer", fields.field("prompt"), "messages of the assistant alone", expected)
    return words[: last + 1]


def _is_same_message(one: Message, other: Message) -> bool:
    words = one.content.strip() == other.content.strip()
    return words and one.role == other.role and one.more == other.more


def _check_no_system(fields: RowFields) -> None:
    system = fields.optional_text("system")
    if system is not None:
        expected, hint = "no system beside text that stands as it is", "put it into the prompt itself, or give messages"
        fields.add("system beside text", fields.field("system"), shown(system), expected, hint)


def _add_unshared(fields: RowFields, actual: str) -> None:
    remedy = column_remedy("name the column of the prompt", ("prompt", COLUMN))
    expected = "responses that begin with the same prompt, since there is no prompt column"
    fields.add("no shared prompt", fields.field("rejected"), actual, expected, remedy=remedy)


def told(prompt: Words) -> str:
    """A prompt as one text: its only message, or all of them with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def prompt_key(prompt: Words, tools: Sequence[Tool] = ()) -> str:
    """A text that is the same only for equal prompts with equal tools."""
    value = prompt if isinstance(prompt, str) else [message.as_template() for message in prompt]
    return json.dumps([value, *tools] if tools else value, sort_keys=True, default=str)
