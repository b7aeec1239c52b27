"""Check that a rendered text contains its messages, and find where.

`TemplateRefusal` is raised if a message, or the reasoning of a trained message, is missing. Templates may change white
space between words and escape text as JSON does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from loopos.data.conversations import ASSISTANT, Message
from loopos.data.record import shown

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning in data sets and templates."""
TEMPLATE_HINT = "name a file with a template that writes it in data.chat_template, or take it out of the rows"
SPLIT_HINT = (
    'give one row for each turn of the assistant (with the turns before it as "prompt"), or set data.chat_template to '
    '"plain"'
)
_NEAR = 4000
"""Characters behind a message in which the next one usually begins."""


class TemplateRefusal(ValueError):
    """A template cannot render some messages so that what the assistant says can be learned; says why, and `hint`."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def with_reasoning(message: dict[str, object]) -> dict[str, object]:
    """The message with its reasoning under each name that templates read, as transformers passes it."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, REASONING[0]: reasoning}


def check_reasoning(message: Message, turn: str) -> None:
    """Raises `TemplateRefusal` where a turn that is learned holds no word of the message's reasoning."""
    for name in REASONING:
        content = message.more.get(name)
        if isinstance(content, str) and end_of_text(content, turn, 0, len(turn)) < 0:
            reason = f"the chat template drops the assistant's {name}: {shown(content)}"
            raise TemplateRefusal(reason, SPLIT_HINT)


def check_context(messages: Sequence[Message], whole: str) -> None:
    """Raises `TemplateRefusal` for a message of others than the assistant whose words the text does not hold. They may
    be anywhere, and be escaped as in JSON.
    """
    position = 0
    for message in messages:
        if message.role == ASSISTANT or not message.content.strip():
            continue
        content = message.content.strip()
        end = _next_end(content, whole, position)
        if end < 0:
            # Slower, and for few: the content elsewhere, or with other white space.
            end = end_of_text(content, whole, position, len(whole))
        if end >= 0:
            position = end
        elif end_of_text(content, whole, 0, position) < 0:
            reason = f"the chat template leaves out a message of the role {message.role}: {shown(message.content)}"
            raise TemplateRefusal(reason, TEMPLATE_HINT)


def _next_end(content: str, whole: str, start: int) -> int:
    """Where words, as they stand or as JSON escapes them, end behind `start`; -1 if nowhere. What comes next is looked
    at first: a search to the end for each message would take the square of the conversation's length.
    """
    escaped = json.dumps(content, ensure_ascii=False)[1:-1]
    near = start + 2 * len(escaped) + _NEAR
    ends = (end_of(text, whole, start, limit) for limit in (near, len(whole)) for text in (content, escaped))
    return next((position for position in ends if position >= 0), -1)


def end_of(text: str, whole: str, start: int, limit: int | None = None) -> int:
    """Where `text` ends in `whole[start:limit]`; -1 if it is not there."""
    position = whole.find(text, start, limit)
    return position + len(text) if position >= 0 else -1


def end_of_text(content: str, whole: str, start: int, limit: int) -> int:
    """Where the words of `content` end in `whole[start:limit]`, whatever white space is between them; -1 if nowhere."""
    position = whole.find(content.strip(), start, limit)
    if position >= 0:
        return position + len(content.strip())
    pattern = re.compile(r"\s*".join(re.escape(word) for word in content.split()))
    found = pattern.search(whole, start, limit)
    return found.end() if found is not None else -1


def num_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """How many characters (or tokens) both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (left, right) in pairs if left != right), min(len(one), len(other)))


def changes(prompt: str, whole: str) -> str:
    """The sentence that says where a prompt is not what the whole text begins with."""
    position = num_shared(prompt, whole)
    return (
        "the chat template changes earlier text when messages follow: "
        f"{shown(prompt[position : position + 40])} became {shown(whole[position : position + 40])}"
    )
