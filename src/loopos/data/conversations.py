"""Read conversations: messages with roles, from the common formats.

Formats: `messages` (role and content: OpenAI, TRL, Axolotl), ShareGPT's `conversations` (from and value), Alpaca's
instruction, input, output (with LLaMA-Factory's history), TRL's prompt and completion as lists of messages. Other keys
of a message (`name`, `reasoning_content` …) reach the chat template unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loopos.data.context import with_context
from loopos.data.record import kind_name, shown
from loopos.data.row_fields import RowFields
from loopos.data.rows import Row
from loopos.data.tool_schemas import CALLS, Tool, call_names, calls_of_content, tools_of, with_calls, with_ids

ASSISTANT = "assistant"
_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "tool_call": ASSISTANT,
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
"""The names of speakers in data sets → the role that a chat template knows."""

_CALLERS = ("function_call", "tool_call")
"""Roles of messages whose content is a call of a tool, or a list of calls."""

HISTORY_NAMES = (frozenset({"history"}),)
"""The names of a column with earlier turns, in tiers."""

_NAMES = (("role", "content"), ("from", "value"))
_MESSAGE_EXPECTED = 'a message such as {"role": "user", "content": "..."}'
_WEIGHT = "weight"
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_EXPECTED = 'text, or parts {"type": "text", "text": "..."}'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` scales the loss of an assistant's turn (0 = only context) and means nothing for others.
    `more` holds the other keys of the message for the chat template.
    """

    role: str
    content: str
    weight: float = 1.0
    more: Mapping[str, object] = field(default_factory=dict)

    def as_template(self) -> dict[str, object]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; at least one behind the first `num_prompt`, which are context, is the assistant's. `tools`:
    those that the template writes before them.
    """

    messages: tuple[Message, ...]
    row: Row
    num_prompt: int = 0
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """Messages that the assistant is to answer, and the tools that it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def conversation(fields: RowFields) -> Conversation | None:
    """The conversation of a row with `messages` or `conversations`; None, with `fields.problems` filled, else."""
    messages = messages_of(fields, "messages")
    return _whole(fields, with_system(fields, messages, "the messages"), "messages")


def instruction(fields: RowFields) -> Conversation | None:
    """The conversation of an Alpaca row: earlier turns of `history`, then instruction and, below it, its context."""
    question, output = with_context(fields, "instruction"), fields.text("output")
    messages = [
        *_optional_message("system", fields.optional_text("system")),
        *history_of(fields),
        Message("user", question),
    ]
    return _whole(fields, [*messages, Message(ASSISTANT, output)], "output")


def prompted(fields: RowFields) -> Conversation | None:
    """The conversation of TRL's prompt and completion as lists of messages: only the completion is trained."""
    prompt, completion = messages_of(fields, "prompt"), messages_of(fields, "completion")
    return _whole(fields, [*prompt, *completion], "completion", num_prompt=len(prompt))


def messages_of(fields: RowFields, role: str) -> list[Message]:
    """The messages of a role's column; those that cannot be read are noted in `fields.problems` and left out."""
    found: list[Message] = []
    calls = 0
    for number, value in enumerate(fields.listed_values(role, "a list of messages")):
        message = message_of(fields, f"{fields.field(role)}[{number}]", value)
        if message is None:
            continue
        if _calls_in_content(value):
            # The calls of one turn are several messages, after what the assistant says.
            message = replace(message, more=with_ids(message.more, calls))
            calls += len(call_names(message.more))
            if found and found[-1].role == ASSISTANT:
                message = _with_calls_of(found.pop(), message)
        found.append(message)
    return answered(found) if calls else found


def answered(messages: Sequence[Message]) -> list[Message]:
    """The messages, those of tools with the id of the call that they answer, in the order of the calls."""
    found, waiting = [], list[str]()
    for message in messages:
        calls = message.more.get(CALLS)
        if isinstance(calls, list):
            waiting = [str(call["id"]) for call in calls if "id" in call]
        elif message.role == "tool" and waiting and "tool_call_id" not in message.more:
            message = replace(message, more={**message.more, "tool_call_id": waiting.pop(0)})
        found.append(message)
    return found


def _with_calls_of(before: Message, calling: Message) -> Message:
    """A turn of the assistant whose calls follow in messages of their own."""
    calls = [call for message in (before, calling) for call in _listed(message.more.get(CALLS))]
    return replace(before, more={**before.more, CALLS: calls})


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _speaker(value: object) -> str:
    """The name of a message's speaker as the row has it; empty where it has none."""
    found = (value.get("role", value.get("from")) if isinstance(value, dict) else None) or ""
    return found.strip().lower() if isinstance(found, str) else ""


def _calls_in_content(value: object) -> bool:
    return _speaker(value) in _CALLERS


def message_of(fields: RowFields, source: str, value: object) -> Message | None:
    """The message that a value at `source` of a row holds; None, with `fields.problems` filled, if there is none."""
    if not isinstance(value, dict):
        fields.add("message is not an object", source, f"{shown(value)} ({kind_name(value)})", _MESSAGE_EXPECTED)
        return None
    names = next((pair for pair in _NAMES if pair[0] in value), None)
    if names is None:
        actual = f"an object with {', '.join(shown(name) for name in value) or 'nothing'}"
        fields.add("message has no role", source, actual, _MESSAGE_EXPECTED)
        return None
    speaker, content_key = names
    role = _ROLES.get(value[speaker].strip().lower()) if isinstance(value[speaker], str) else None
    if role is None:
        expected = f"one of {', '.join(_ROLES)}"
        fields.add("unknown role", f"{source}.{speaker}", shown(value[speaker]), expected)
        return None
    more = {key: item for key, item in value.items() if key not in (speaker, content_key, _WEIGHT) and item is not None}
    if _calls_in_content(value):
        calls = calls_of_content(fields, f"{source}.{content_key}", value.get(content_key))
        weight = _weight(fields, source, role, value.get(_WEIGHT))
        return None if calls is None else Message(role, "", weight, {**more, CALLS: calls})
    more = with_calls(fields, source, more)
    content = _content(fields, f"{source}.{content_key}", value.get(content_key), is_optional=CALLS in more)
    return Message(role, content, _weight(fields, source, role, value.get(_WEIGHT)), more)


def with_system(fields: RowFields, messages: Sequence[Message], summary: str) -> tuple[Message, ...]:
    """The messages behind that of the system's column, which must hold the only words of the system. `summary`: name
    of the messages in diagnostics.
    """
    system = fields.optional_text("system")
    if system is not None and messages and messages[0].role in ("system", "developer"):
        actual = f"a system message at the start of {summary} too"
        fields.add("two system messages", fields.field("system"), actual, "one system message")
    return (*_optional_message("system", system), *messages)


def _whole(fields: RowFields, messages: Sequence[Message], role: str, *, num_prompt: int = 0) -> Conversation | None:
    learned = messages[num_prompt:]
    if not fields.problems and not any(message.role == ASSISTANT for message in learned):
        roles = ", ".join(dict.fromkeys(message.role for message in learned)) or "none"
        sentence = f"no assistant message: nothing to learn (roles: {roles})"
        fields.add("no assistant message", fields.field(role), sentence, "")
    tools = tools_of(fields)
    return None if fields.problems else Conversation(tuple(messages), fields.row, num_prompt, tools)


def _optional_message(role: str, content: str | None) -> list[Message]:
    return [] if content is None else [Message(role, content)]


def history_of(fields: RowFields) -> list[Message]:
    """The messages of LLaMA-Factory's pairs of earlier instructions and answers, oldest first."""
    value, messages = fields.structure("history"), list[Message]()
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        actual = f"{shown(value)} ({kind_name(value)})"
        fields.add(
            "history is not a list of pairs",
            fields.field("history"),
            actual,
            'pairs such as [["question", "answer"], ...]',
            'to leave it out: data.columns: {"history": null}',
        )
        return []
    for number, (question, reply) in enumerate(value):
        location = f"{fields.field('history')}[{number}]"
        messages.append(Message("user", fields.checked("history", f"{location}[0]", question)))
        messages.append(Message(ASSISTANT, fields.checked("history", f"{location}[1]", reply)))
    return messages


def _content(fields: RowFields, source: str, value: object, *, is_optional: bool) -> str:
    """The words of a message: a text, or a list of text parts, which are joined."""
    if is_optional and (value is None or value == ""):
        return ""
    if isinstance(value, list):
        texts = []
        for number, part in enumerate(value):
            text = _text_of(part)
            if text is None:
                kind = part.get("type") if isinstance(part, dict) else None
                actual = f"a part of the type {shown(kind)}" if kind is not None else f"a part {shown(part)}"
                hint = "images, sound and files are not learned: take them out of the rows, or the rows themselves"
                fields.add("content has parts that are not text", f"{source}[{number}]", actual, _PART_EXPECTED, hint)
                return ""
            texts.append(text)
        value = "".join(texts)
    return fields.checked("content", source, value)


def _text_of(part: object) -> str | None:
    """The text of a part of a message; None for a part of another kind."""
    if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _weight(fields: RowFields, source: str, role: str, value: object) -> float:
    """The factor on the loss of an assistant's message: 1 where nothing is said."""
    if role != ASSISTANT and value not in (None, 0):
        actual = f"{shown(value)} on a message of the {role}"
        hint = "train_on all learns what users say too"
        fields.add("weight on a message that is not learned", f"{source}.{_WEIGHT}", actual, "0, or no weight", hint)
    if value is None or role != ASSISTANT:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        fields.add("weight is not a number >= 0", f"{source}.{_WEIGHT}", shown(value), "a number >= 0")
        return 1.0
    return float(value)
